//! Kernels that work on many tensors at once, as AdamW on all parameters: which block works on what is a table in the GPU's memory.
//!
//! A node's launch brings the tasks of its own tensors. Neighbouring steps with the same kernel, of which none reads what another
//! writes, are joined: their tasks become one table and one launch.

use std::collections::HashSet;

use super::executable::Addresses;
use super::launch::{Arg, Task};
use crate::places::{Place, StepPlaces};

/// An address or a number of a task.
enum Field {
    Address(Place, usize),
    Bytes(Vec<u8>),
}

/// One task, its places known.
struct Row {
    blocks: usize,
    fields: Vec<Field>,
}

/// The tasks of one launch.
pub(super) struct Table {
    /// Where it lies in an instance's memory for tables.
    at: usize,
    rows: Vec<Row>,
}

fn field(arg: &Arg, places: &StepPlaces) -> Field {
    match arg {
        Arg::Operand(i) => Field::Address(places.operands[*i], 0),
        Arg::OperandAt(i, at) => Field::Address(places.operands[*i], *at),
        Arg::Result(i) => Field::Address(places.results[*i], 0),
        Arg::ResultAt(i, at) => Field::Address(places.results[*i], *at),
        Arg::Scratch(at) => Field::Address(Place::Arena(places.scratch.0), *at),
        Arg::Null => Field::Bytes(0u64.to_le_bytes().to_vec()),
        Arg::I32(n) => Field::Bytes(n.to_le_bytes().to_vec()),
        Arg::U32(n) => Field::Bytes(n.to_le_bytes().to_vec()),
        Arg::I64(n) => Field::Bytes(n.to_le_bytes().to_vec()),
        Arg::F32(x) => Field::Bytes(x.to_le_bytes().to_vec()),
        Arg::Counters | Arg::Fault | Arg::Step | Arg::Bytes(_) | Arg::Box(_) => {
            unreachable!("tasks have addresses and numbers")
        }
    }
}

impl Table {
    /// The table of one node's tasks.
    pub(super) fn new(tasks: &[Task], places: &StepPlaces) -> Table {
        let row = |t: &Task| Row { blocks: t.blocks, fields: t.args.iter().map(|a| field(a, places)).collect() };
        Table { at: 0, rows: tasks.iter().map(row).collect() }
    }

    /// With the tasks of another behind its own.
    pub(super) fn append(&mut self, other: &mut Table) {
        self.rows.append(&mut other.rows);
    }

    /// Gives it a place behind `used` bytes; what is used then.
    pub(super) fn place(&mut self, used: usize) -> usize {
        self.at = used;
        used + self.rows.iter().map(Row::bytes).sum::<usize>()
    }

    /// Where it lies in the memory for tables.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// How many tasks there are.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// Blocks of all tasks.
    pub(super) fn blocks(&self) -> usize {
        self.rows.iter().map(|row| row.blocks).sum()
    }

    /// Its bytes, as the kernel's array of `Task`.
    pub(super) fn bytes(&self, addresses: Addresses<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut first = 0;
        for row in &self.rows {
            bytes.extend((first as i64).to_le_bytes());
            for field in &row.fields {
                match field {
                    Field::Address(place, at) => bytes.extend((addresses.of(*place) + *at as u64).to_le_bytes()),
                    Field::Bytes(b) => bytes.extend(b),
                }
            }
            bytes.resize(bytes.len().next_multiple_of(ALIGNED), 0);
            first += row.blocks;
        }
        bytes
    }
}

/// What a task's length is a multiple of: the alignment of its addresses.
const ALIGNED: usize = 8;

impl Row {
    fn bytes(&self) -> usize {
        let field = |field: &Field| match field {
            Field::Address(..) => 8,
            Field::Bytes(b) => b.len(),
        };
        (8 + self.fields.iter().map(field).sum::<usize>()).next_multiple_of(ALIGNED)
    }
}

/// The stored tensors that steps which are joined touch.
#[derive(Default)]
pub(super) struct Touched {
    read: HashSet<usize>,
    written: HashSet<usize>,
}

impl Touched {
    /// What one step touches, if others may run at the same time as it.
    pub(super) fn by(places: &StepPlaces) -> Option<Touched> {
        let mut touched = Touched::default();
        touched.joins(places).then_some(touched)
    }

    /// Whether a step may run at the same time as those before, and if so counts it among them: it writes stored tensors only,
    /// none of which the others touch, and reads none that they write.
    pub(super) fn joins(&mut self, places: &StepPlaces) -> bool {
        let states = |places: &[Place]| -> Vec<usize> {
            let state = |place: &Place| if let Place::State(i) = place { Some(*i) } else { None };
            places.iter().filter_map(state).collect()
        };
        let (reads, writes) = (states(&places.operands), states(&places.results));
        let apart = writes.len() == places.results.len()
            && writes.iter().all(|i| !self.read.contains(i) && !self.written.contains(i))
            && reads.iter().all(|i| !self.written.contains(i));
        if apart {
            self.read.extend(reads);
            self.written.extend(writes);
        }
        apart
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(operands: &[Place], results: &[Place]) -> StepPlaces {
        StepPlaces {
            operands: operands.to_vec(),
            results: results.to_vec(),
            scratch: (512, 0),
            fresh: vec![],
            fences: vec![],
        }
    }

    #[test]
    fn a_table_is_the_array_that_the_kernel_reads() {
        let states = [7000, 8000];
        let addresses = Addresses { arena: 100_000, states: &states, fault: 0, tables: 0, counters: 0 };
        let at = places(&[Place::Arena(256), Place::State(1)], &[Place::State(0)]);
        let task =
            |blocks, n| Task { blocks, args: vec![Arg::Result(0), Arg::OperandAt(0, 4), Arg::Scratch(8), Arg::I32(n)] };
        let mut table = Table::new(&[task(3, 5)], &at);
        table.append(&mut Table::new(&[task(2, 6)], &at));
        assert_eq!((table.blocks(), table.len(), table.place(64), table.at()), (5, 2, 64 + 80, 64));
        let words: Vec<u64> =
            table.bytes(addresses).chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(words, [0, 7000, 100_260, 100_520, 5, 3, 7000, 100_260, 100_520, 6]);
    }

    #[test]
    fn only_steps_that_do_not_touch_each_other_are_joined() {
        let [a, b, c] = [0, 1, 2].map(Place::State);
        let mut touched = Touched::by(&places(&[a, c, Place::Arena(0)], &[a])).unwrap();
        assert!(touched.joins(&places(&[b, c], &[b])));
        // The same tensor again, one that is written, one that others read, and one of the arena.
        assert!(!touched.joins(&places(&[], &[a])));
        assert!(!touched.joins(&places(&[b], &[])));
        assert!(!touched.joins(&places(&[], &[c])));
        assert!(!touched.joins(&places(&[], &[Place::Arena(0)])));
        assert!(Touched::by(&places(&[], &[Place::Arena(0)])).is_none());
    }
}
