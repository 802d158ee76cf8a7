//! A node's work on a device as plain data: which kernels, over how many workgroups, on which buffers, with which numbers.

use super::shader::Source;
use crate::lowering::Rejects;

/// Where a buffer of a kernel is. Addresses are known when an instance is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// An operand.
    Operand(usize),
    /// A result.
    Result(usize),
    /// So many bytes of the node's scratch memory from this one on.
    Scratch { at: usize, bytes: usize },
    /// The record in which a kernel notes a value it rejects.
    Fault,
    /// The count of workgroups that are done, of a kernel in which the last one goes on: 0 between kernels.
    Arrivals,
    /// Nowhere: what the kernel would read is 0, and what it would write is dropped.
    Null,
}

/// A number that a kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Number {
    /// These bits.
    Word(u32),
    /// The number under which the node's rejections are noted.
    Step,
}

/// One kernel with its arguments.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kernel {
    pub(crate) source: Source,
    /// In the order of the bindings.
    pub(crate) buffers: Vec<At>,
    /// In the order of the struct.
    pub(crate) numbers: Vec<Number>,
    /// Workgroups along x, y and z.
    pub(crate) groups: [usize; 3],
}

/// One thing to put on the queue.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// Launch a kernel; one without workgroups is left out.
    Kernel(Kernel),
    /// Set bytes to zero.
    Clear {
        /// The first one.
        at: At,
        /// How many.
        bytes: usize,
    },
}

/// The work of a node, and of the chain that is joined onto it.
pub(crate) struct Launch {
    /// Bytes of scratch memory.
    pub(crate) scratch: usize,
    /// In order.
    pub(crate) actions: Vec<Action>,
    /// If kernels of it note rejected values.
    pub(crate) rejects: Option<Rejects>,
    /// Whether the node's results are in memory afterwards: the chain may be all that reads them.
    pub(crate) stored: bool,
    /// If it does the work of the node before it: whether that one's results are in memory afterwards.
    pub(crate) lead: Option<bool>,
    /// If it does the work of a combine behind it: whether that one's result is in memory afterwards.
    pub(crate) combined: Option<bool>,
}

impl Default for Launch {
    fn default() -> Launch {
        Launch::of(Vec::new())
    }
}

impl Launch {
    /// Work without scratch memory.
    pub(crate) fn of(actions: Vec<Action>) -> Launch {
        Launch { scratch: 0, actions, rejects: None, stored: true, lead: None, combined: None }
    }

    /// With this scratch memory.
    #[must_use]
    pub(crate) fn with_scratch(mut self, scratch: &Scratch) -> Launch {
        self.scratch = scratch.used;
        self
    }

    /// Which does the work of the node before it, if it is told whether that one's results are kept.
    #[must_use]
    pub(crate) fn leading(mut self, kept: Option<bool>) -> Launch {
        self.lead = kept;
        self
    }

    /// Which does the work of a combine behind it, if it is told whether that one's result is kept.
    #[must_use]
    pub(crate) fn combining(mut self, kept: Option<bool>) -> Launch {
        self.combined = kept;
        self
    }

    /// Whose kernels note values they reject.
    #[must_use]
    pub(crate) fn rejecting(mut self, wanted: String, found: &'static str) -> Launch {
        self.rejects = Some(Rejects { wanted, found });
        self
    }

    /// Without what is nothing to do.
    #[must_use]
    pub(crate) fn trimmed(mut self) -> Launch {
        self.actions.retain(|action| match action {
            Action::Kernel(k) => k.groups.iter().all(|&n| n > 0),
            Action::Clear { bytes, .. } => *bytes > 0,
        });
        self
    }
}

/// Places in scratch memory handed out one after another, each at a multiple of 128 bytes.
#[derive(Default)]
pub(crate) struct Scratch {
    used: usize,
}

impl Scratch {
    /// `bytes` more.
    pub(crate) fn take(&mut self, bytes: usize) -> At {
        let at = self.used;
        self.used += bytes.next_multiple_of(128);
        At::Scratch { at, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_scratch_memory_do_not_touch() {
        let mut scratch = Scratch::default();
        let parts = [scratch.take(5), scratch.take(128), scratch.take(1)];
        let at = |at, bytes| At::Scratch { at, bytes };
        assert_eq!(parts, [at(0, 5), at(128, 128), at(256, 1)]);
        assert_eq!(Launch::default().with_scratch(&scratch).scratch, 384);
    }
}
