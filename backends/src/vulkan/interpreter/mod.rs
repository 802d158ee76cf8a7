//! Runs a kernel's SPIR-V on the host, lane by lane, so that what no device here can run is checked all the same: kernels with
//! cooperative matrices, and those whose lanes exchange values.
//!
//! A lane runs until it meets others: at a barrier all of the workgroup, at an exchange or an operation on a cooperative matrix those of its
//! subgroup of 32. Lanes that do not meet, and addresses outside of a buffer, are errors. Memory of a workgroup begins as NaN.

#![expect(clippy::wildcard_enum_match_arm, reason = "what is not known here is an error")]

mod lane;
mod module;

use std::rc::Rc;

use lane::{Lane, Stop};
use module::{Module, Type};

const LANES: usize = 32;

/// A value; floats and bools are their bits.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Word(u32),
    Many(Vec<Value>),
    Matrix(Rc<Vec<f32>>),
    Pointer(Pointer),
}

/// Where something is.
#[derive(Clone, Debug)]
pub(super) enum Pointer {
    /// At a byte of a piece of memory, a value of a type.
    Shared { memory: usize, at: usize, ty: u32 },
    /// A part of a variable of the lane.
    Own { variable: usize, path: Vec<u32>, ty: u32 },
}

/// Memory that lanes share: the buffers by their binding, the numbers, the workgroup's variables.
pub(super) struct Memory {
    pieces: Vec<Vec<u8>>,
}

impl Memory {
    fn slice(&self, memory: usize, at: usize, len: usize) -> Result<&[u8], String> {
        let all = &self.pieces[memory];
        all.get(at..at + len).ok_or_else(|| format!("byte {at} of memory {memory}, which has {}", all.len()))
    }

    fn put(&mut self, memory: usize, at: usize, bytes: &[u8]) -> Result<(), String> {
        let all = &mut self.pieces[memory];
        let len = all.len();
        let to = all.get_mut(at..at + bytes.len());
        to.ok_or_else(|| format!("byte {at} of memory {memory}, which has {len}"))?.copy_from_slice(bytes);
        Ok(())
    }

    fn load(&self, m: &Module, memory: usize, at: usize, ty: u32) -> Result<Value, String> {
        match &m.types[ty] {
            Type::Vector { count, .. } | Type::Array { count, .. } => {
                let part = |i| m.part(ty, i as u32).and_then(|(from, of)| self.load(m, memory, at + from, of));
                Ok(Value::Many((0..*count).map(part).collect::<Result<_, _>>()?))
            }
            Type::Bool | Type::Int { .. } | Type::Float { .. } => {
                let mut word = [0; 4];
                let bytes = self.slice(memory, at, m.bytes(ty))?;
                word[..bytes.len()].copy_from_slice(bytes);
                Ok(Value::Word(u32::from_le_bytes(word)))
            }
            other => Err(format!("a load of {other:?}")),
        }
    }

    fn store(&mut self, m: &Module, memory: usize, at: usize, ty: u32, value: &Value) -> Result<(), String> {
        match value {
            Value::Word(word) => self.put(memory, at, &word.to_le_bytes()[..m.bytes(ty)]),
            Value::Many(parts) => parts.iter().zip(0..).try_for_each(|(part, i)| {
                let (from, of) = m.part(ty, i)?;
                self.store(m, memory, at + from, of, part)
            }),
            Value::Matrix(_) | Value::Pointer(_) => Err("a store of what has no bytes".into()),
        }
    }
}

/// Runs these workgroups, of `all`, one after another; `buffers` by their binding, `numbers` as they are pushed. `backwards`: the last
/// lane first, which changes nothing if no lane relies on another before a barrier.
///
/// # Errors
/// What is wrong with the kernel, or what is not known here.
pub(super) fn run(
    words: &[u32],
    buffers: &mut Vec<Vec<u8>>,
    numbers: &[u8],
    groups: &[[u32; 3]],
    all: [u32; 3],
    backwards: bool,
) -> Result<(), String> {
    let module = Module::of(words)?;
    let bound = buffers.len();
    let mut memory = Memory { pieces: std::mem::take(buffers) };
    memory.pieces.push(numbers.to_vec());
    let mut failed = Ok(());
    for &group in groups {
        memory.pieces.truncate(bound + 1);
        failed = workgroup(&module, &mut memory, bound, group, all, backwards);
        if failed.is_err() {
            break;
        }
    }
    memory.pieces.truncate(bound);
    *buffers = memory.pieces;
    failed
}

fn workgroup(
    m: &Module,
    memory: &mut Memory,
    numbers: usize,
    group: [u32; 3],
    all: [u32; 3],
    backwards: bool,
) -> Result<(), String> {
    let shared = lane::shared(m, memory, numbers)?;
    let mut lanes: Vec<Lane<'_>> =
        (0..m.threads).map(|t| Lane::new(m, &shared, t as u32, group, all)).collect::<Result<_, _>>()?;
    let mut stops = vec![Stop::Ready; lanes.len()];
    loop {
        let mut order: Vec<usize> = (0..lanes.len()).collect();
        if backwards {
            order.reverse();
        }
        for i in order {
            if stops[i] == Stop::Ready {
                stops[i] = lanes[i].run(memory)?;
            }
        }
        if stops.iter().all(|&s| s == Stop::Done) {
            return Ok(());
        }
        if stops.iter().all(|&s| s == stops[0] && matches!(s, Stop::Barrier(_))) {
            stops.fill(Stop::Ready);
            continue;
        }
        let mut met = false;
        for (lanes, stops) in lanes.chunks_mut(LANES).zip(stops.chunks_mut(LANES)) {
            if let Stop::Matrix(at) = stops[0]
                && stops.iter().all(|&s| s == stops[0])
            {
                let (first, others) = lanes.split_first_mut().ok_or("no lanes")?;
                let result = first.matrix(memory, at)?;
                others.iter_mut().for_each(|lane| lane.take(at, &result));
                first.take(at, &result);
                stops.fill(Stop::Ready);
                met = true;
            } else if let Stop::Shuffle(at) = stops[0]
                && stops.iter().all(|&s| s == stops[0])
            {
                let given = lanes.iter().map(|lane| lane.given(at)).collect::<Result<Vec<_>, _>>()?;
                for (i, lane) in lanes.iter_mut().enumerate() {
                    let (value, _) = given.get(i ^ given[i].1).ok_or("a lane of another subgroup")?;
                    lane.take(at, &Some(value.clone()));
                }
                stops.fill(Stop::Ready);
                met = true;
            }
        }
        if !met {
            return Err(format!("lanes do not meet: {:?} and others", stops[0]));
        }
    }
}
