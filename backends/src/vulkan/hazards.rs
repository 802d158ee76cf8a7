//! Which commands must wait for those before them: where one reads what another writes, or writes what another reads or writes.

use moebius_ir::{Plan, Step};

use super::executable::bytes_of;
use super::launch::{Action, At, Launch};
use crate::joined::Beside;
use crate::places::{Place, StepPlaces, of_step, place, states};

/// Steps among which those that need not wait are looked for: what belongs together in time stays near in caches.
pub(super) const AHEAD: usize = 16;
/// Bytes of a buffer whose memory is not used again before so many steps, so that these can run beside each other: what is larger keeps
/// a device busy alone.
pub(super) const LATER_BYTES: usize = 64 << 10;

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

/// Which commands a barrier keeps apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Barrier {
    /// Kernels.
    Kernels,
    /// Kernels, and what fills and copies.
    All,
}

/// What was used since the last barrier.
#[derive(Default)]
pub(super) struct Hazards {
    uses: Vec<Use>,
    /// Something of it was filled or copied.
    moved: bool,
    /// The last barrier was one of kernels: what fills or copies has not waited for those before it.
    narrow: bool,
}

impl Hazards {
    /// Whether a command with these uses shares memory with any of these.
    fn meet(&self, uses: &[Use]) -> bool {
        uses.iter().any(|u| self.uses.iter().any(|before| u.meets(before)))
    }

    /// The barrier that there must be before a command with these uses, which is the next one; `moves`: it fills or copies.
    pub(super) fn wait(&mut self, uses: &[Use], moves: bool) -> Option<Barrier> {
        let barrier = (self.meet(uses) || moves && self.narrow).then_some(match moves || self.moved {
            true => Barrier::All,
            false => Barrier::Kernels,
        });
        if barrier.is_some() {
            *self = Hazards { narrow: barrier == Some(Barrier::Kernels), ..Hazards::default() };
        }
        self.uses.extend_from_slice(uses);
        self.moved |= moves;
        barrier
    }
}

/// Whether a kernel may write a buffer that is given so. Whoever updates an operand is given it as a result.
pub(super) fn writes(at: At) -> bool {
    match at {
        At::Operand(_) | At::Null => false,
        At::Result(_) | At::Scratch { .. } | At::Fault | At::Arrivals => true,
    }
}

/// The buffers of an action, and how much of them it uses if not all.
fn buffers(action: &Action) -> Vec<(At, Option<usize>)> {
    match action {
        Action::Clear { at, bytes } => vec![(*at, Some(*bytes))],
        Action::Kernel(kernel) => kernel.buffers.iter().map(|&at| (at, None)).collect(),
    }
}

/// What the commands of each step of a plan use, and whether they fill or copy; without a device, for launches by node.
fn uses(plan: &Plan, launches: &[Launch]) -> Vec<Vec<(Vec<Use>, bool)>> {
    let (graph, states) = (plan.graph(), states(plan));
    // The arena, then a buffer for each tensor.
    let at = |place: Place| match place {
        Place::Arena(offset) => (1, offset),
        Place::State(i) => (i as u64 + 4, 0),
    };
    let of = |(i, step): (usize, &Step)| match *step {
        Step::Run { node, scratch, scratch_bytes } => {
            let Some(beside) = Beside::of(plan, node) else { return Vec::new() };
            let places: StepPlaces = of_step(plan, &states, i, node, beside.nodes(), (scratch, scratch_bytes));
            let bytes = bytes_of(plan, node, beside);
            let used = |(of, some): (At, Option<usize>)| {
                let ((buffer, from), bytes) = match of {
                    At::Operand(i) => (at(places.operands[i]), bytes[0][i]),
                    At::Result(i) => (at(places.results[i]), bytes[1][i]),
                    At::Scratch { at, bytes } => ((1, places.scratch.0 + at), bytes),
                    At::Fault | At::Null => ((2, 0), 8),
                    At::Arrivals => ((3, 0), 4),
                };
                let bytes = some.unwrap_or(bytes).max(4) as u64;
                Use { buffer, from: from as u64, bytes, writes: writes(of) }
            };
            let moves = |action: &Action| matches!(action, Action::Clear { .. });
            let of = |action: &Action| (buffers(action).into_iter().map(used).collect(), moves(action));
            launches[node.index()].actions.iter().map(of).collect()
        }
        Step::Copy { state, new } => {
            let of = |v, writes| {
                let (buffer, from) = at(place(plan, &states, v));
                Use { buffer, from: from as u64, bytes: graph.ty(v).bytes() as u64, writes }
            };
            vec![(vec![of(new, false), of(state, true)], true)]
        }
    };
    plan.steps().iter().enumerate().map(of).collect()
}

/// The order in which the steps of a plan are put on the queue: between two barriers as many as share no memory, so that a short chain of
/// steps runs beside another one. Steps that share memory keep their order.
pub(super) fn order(plan: &Plan, launches: &[Launch]) -> Vec<usize> {
    let all = |step: Vec<(Vec<Use>, bool)>| step.into_iter().flat_map(|(uses, _)| uses).collect();
    let steps: Vec<Vec<Use>> = uses(plan, launches).into_iter().map(all).collect();
    in_groups(&steps)
}

fn in_groups(steps: &[Vec<Use>]) -> Vec<usize> {
    let mut rest: Vec<usize> = (0..steps.len()).rev().collect();
    let mut order = Vec::with_capacity(steps.len());
    while !rest.is_empty() {
        // What runs now, and what does not although it comes before; in the end the latter is next again.
        let (mut now, mut later) = (Hazards::default(), Vec::new());
        let mut passed = Hazards::default();
        for step in rest.split_off(rest.len().saturating_sub(AHEAD)).into_iter().rev() {
            let uses = &steps[step];
            if now.meet(uses) || passed.meet(uses) {
                passed.uses.extend_from_slice(uses);
                later.push(step);
            } else {
                now.uses.extend_from_slice(uses);
                order.push(step);
            }
        }
        rest.extend(later.into_iter().rev());
    }
    order
}

/// How many commands a run of a plan is, kernels and others, and how many of them wait for those before; without a device, for
/// launches by node.
pub(super) fn count(plan: &Plan, launches: &[Launch]) -> [usize; 2] {
    let (steps, mut hazards, mut counts) = (uses(plan, launches), Hazards::default(), [0, 0]);
    for (command, moves) in order(plan, launches).into_iter().flat_map(|i| &steps[i]) {
        counts[0] += 1;
        counts[1] += usize::from(hazards.wait(command, *moves).is_some());
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
        let mut waits = |uses: &[Use]| hazards.wait(uses, false).is_some();
        assert!(!waits(&[used(0, 8, false), used(8, 8, true)]));
        // Both read, or what they write lies apart, or in another buffer.
        assert!(!waits(&[used(0, 8, false), used(16, 8, true)]));
        assert!(!waits(&[Use { buffer: 8, ..used(8, 8, true) }]));
        // Reads what was written; then nothing before that counts.
        assert!(waits(&[used(12, 2, false), used(32, 8, true)]));
        assert!(!waits(&[used(0, 8, true)]));
        // Writes what was read; writes what was written.
        assert!(waits(&[used(13, 1, true)]));
        assert!(waits(&[used(8, 8, true)]));
    }

    #[test]
    fn what_fills_or_copies_waits_also_for_kernels_before_a_barrier_of_kernels() {
        let mut hazards = Hazards::default();
        assert_eq!(hazards.wait(&[used(0, 8, true)], false), None);
        assert_eq!(hazards.wait(&[used(0, 8, false), used(8, 8, true)], false), Some(Barrier::Kernels));
        // Reads what was written before the barrier, which did not keep copies behind it.
        assert_eq!(hazards.wait(&[used(0, 8, false), used(16, 8, true)], true), Some(Barrier::All));
        assert_eq!(hazards.wait(&[used(24, 8, true)], true), None);
        // Reads what was copied.
        assert_eq!(hazards.wait(&[used(16, 8, false)], false), Some(Barrier::All));
        assert_eq!(hazards.wait(&[used(32, 8, true)], true), None);
    }

    #[test]
    fn steps_that_share_no_memory_stand_together_and_others_keep_their_order() {
        // Two chains of three, one behind the other, and one that reads what both have left.
        let step = |from: u64, to: u64| vec![used(from, 8, false), used(to, 8, true)];
        let chains = [step(0, 8), step(8, 16), step(16, 24), step(100, 108), step(108, 116), step(116, 124)];
        let last = vec![used(24, 8, false), used(124, 8, false), used(200, 8, true)];
        let steps = [&chains[..], &[last]].concat();
        assert_eq!(in_groups(&steps), [0, 3, 1, 4, 2, 5, 6]);
        // Memory that is used again keeps the second chain behind the first.
        let again = [step(0, 8), step(8, 16), step(100, 8), step(8, 200)];
        assert_eq!(in_groups(&again), [0, 1, 2, 3]);
        // Every step is there once, also where there are more than are looked at together.
        let mut many = in_groups(&vec![step(0, 8); 3 * AHEAD + 1]);
        assert!(many.is_sorted());
        many.dedup();
        assert_eq!(many.len(), 3 * AHEAD + 1);
    }
}
