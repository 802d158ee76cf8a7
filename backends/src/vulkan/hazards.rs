//! Which commands must wait for those before them: where one reads what another writes, or writes what another reads or writes.

use moebius_ir::{Plan, Step};

use super::executable::bytes_of;
use super::launch::{Action, At, Launch};
use crate::joined::Beside;
use crate::places::{Place, StepPlaces, of_step, place, states};

/// A stretch of memory that a command uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    /// Its buffer; different ones share no memory.
    pub(super) buffer: u64,
    pub(super) from: u64,
    pub(super) bytes: u64,
    /// Whether it may be written.
    pub(super) writes: bool,
}

impl Use {
    fn meets(&self, other: &Use) -> bool {
        self.buffer == other.buffer
            && (self.writes || other.writes)
            && self.from < other.from + other.bytes
            && other.from < self.from + self.bytes
    }
}

/// What was used since the last barrier.
#[derive(Default)]
pub(super) struct Hazards(Vec<Use>);

impl Hazards {
    /// Whether there must be a barrier before a command with these uses, which is the next one.
    pub(super) fn wait(&mut self, uses: &[Use]) -> bool {
        let waits = uses.iter().any(|u| self.0.iter().any(|before| u.meets(before)));
        if waits {
            self.0.clear();
        }
        self.0.extend_from_slice(uses);
        waits
    }
}

/// Whether a kernel may write a buffer that is given so. Whoever updates an operand is given it as a result.
pub(super) fn writes(at: At) -> bool {
    match at {
        At::Operand(_) | At::Null => false,
        At::Result(_) | At::Scratch { .. } | At::Fault => true,
    }
}

/// The buffers of an action, and how much of them it uses if not all.
fn buffers(action: &Action) -> Vec<(At, Option<usize>)> {
    match action {
        Action::Clear { at, bytes } => vec![(*at, Some(*bytes))],
        Action::Kernel(kernel) => kernel.buffers.iter().map(|&at| (at, None)).collect(),
    }
}

/// How many commands a run of a plan is, kernels and others, and how many of them wait for those before; without a device, for
/// launches by node.
pub(super) fn count(plan: &Plan, launches: &[Launch]) -> [usize; 2] {
    let (graph, states) = (plan.graph(), states(plan));
    // The arena, then a buffer for each tensor.
    let at = |place: Place| match place {
        Place::Arena(offset) => (1, offset),
        Place::State(i) => (i as u64 + 3, 0),
    };
    let (mut hazards, mut counts) = (Hazards::default(), [0, 0]);
    let mut next = |uses: &[Use]| {
        counts[0] += 1;
        counts[1] += usize::from(hazards.wait(uses));
    };
    for (i, step) in plan.steps().iter().enumerate() {
        match *step {
            Step::Run { node, scratch, scratch_bytes } => {
                let Some(beside) = Beside::of(plan, node) else { continue };
                let places: StepPlaces = of_step(plan, &states, i, node, beside.nodes(), (scratch, scratch_bytes));
                let bytes = bytes_of(plan, node, beside);
                for action in &launches[node.index()].actions {
                    let used = buffers(action).into_iter().map(|(of, some)| {
                        let ((buffer, from), bytes) = match of {
                            At::Operand(i) => (at(places.operands[i]), bytes[0][i]),
                            At::Result(i) => (at(places.results[i]), bytes[1][i]),
                            At::Scratch { at, bytes } => ((1, places.scratch.0 + at), bytes),
                            At::Fault | At::Null => ((2, 0), 8),
                        };
                        let bytes = some.unwrap_or(bytes).max(4) as u64;
                        Use { buffer, from: from as u64, bytes, writes: writes(of) }
                    });
                    next(&used.collect::<Vec<_>>());
                }
            }
            Step::Copy { state, new } => {
                let of = |v, writes| {
                    let (buffer, from) = at(place(plan, &states, v));
                    Use { buffer, from: from as u64, bytes: graph.ty(v).bytes() as u64, writes }
                };
                next(&[of(new, false), of(state, true)]);
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(from: u64, bytes: u64, writes: bool) -> Use {
        Use { buffer: 7, from, bytes, writes }
    }

    #[test]
    fn only_what_meets_in_memory_waits() {
        let mut hazards = Hazards::default();
        assert!(!hazards.wait(&[used(0, 8, false), used(8, 8, true)]));
        // Both read, or what they write lies apart, or in another buffer.
        assert!(!hazards.wait(&[used(0, 8, false), used(16, 8, true)]));
        assert!(!hazards.wait(&[Use { buffer: 8, ..used(8, 8, true) }]));
        // Reads what was written; then nothing before that counts.
        assert!(hazards.wait(&[used(12, 2, false), used(32, 8, true)]));
        assert!(!hazards.wait(&[used(0, 8, true)]));
        // Writes what was read; writes what was written.
        assert!(hazards.wait(&[used(13, 1, true)]));
        assert!(hazards.wait(&[used(8, 8, true)]));
    }
}
