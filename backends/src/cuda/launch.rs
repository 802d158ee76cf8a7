//! A node's work on the GPU as plain data: which kernels, over which grids, with which arguments.

use moebius_ir::DType;

use super::source::Source;
use crate::lowering::Rejects;

/// What a kernel is given. Addresses are known when an instance is made.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Arg {
    /// Address of an operand.
    Operand(usize),
    /// Address this many bytes into an operand.
    OperandAt(usize, usize),
    /// Address of a result.
    Result(usize),
    /// Address this many bytes into a result.
    ResultAt(usize, usize),
    /// Address this many bytes into the node's scratch memory.
    Scratch(usize),
    /// A null address.
    Null,
    /// Address of the launch's counters.
    Counters,
    /// Address of the record in which a kernel notes a value it rejects.
    Fault,
    /// The number under which the node's rejections are noted.
    Step,
    /// A number.
    I32(i32),
    /// A number.
    U32(u32),
    /// A number.
    I64(i64),
    /// A number.
    F32(f32),
    /// A struct by value.
    Bytes(Vec<u8>),
    /// A tensor as the tensor memory accelerator copies it: the driver's description by value.
    Box(Box<TensorBox>),
}

/// A tensor of three axes in row-major order, the innermost first, and the box that is copied of it at a time: into shared
/// memory, lines of 128 bytes, swizzled; 0 outside of the tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorBox {
    /// Its address, a multiple of 16.
    pub(crate) at: Arg,
    /// A float of 16 bits.
    pub(crate) dtype: DType,
    /// Elements along each axis.
    pub(crate) dims: [usize; 3],
    /// Bytes between neighbours along the second and third axis: multiples of 16.
    pub(crate) strides: [usize; 2],
    /// Elements of the box along each axis.
    pub(crate) extent: [usize; 3],
}

impl Arg {
    /// The same of a node whose operands and results come behind so many of others.
    pub(crate) fn behind(self, [operands, results]: [usize; 2]) -> Arg {
        if let Arg::Operand(i) = self {
            Arg::Operand(operands + i)
        } else if let Arg::Result(i) = self {
            Arg::Result(results + i)
        } else {
            self
        }
    }

    /// A size as a 64-bit number.
    pub(crate) fn size(n: usize) -> Arg {
        Arg::I64(n as i64)
    }
}

/// One kernel with its arguments.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kernel {
    /// Where its text is.
    pub(crate) source: Source,
    /// Its name there.
    pub(crate) name: &'static str,
    /// Blocks along x, y and z.
    pub(crate) grid: [usize; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Bytes of shared memory that are asked for at the launch.
    pub(crate) shared: usize,
    /// In the order of the kernel's parameters.
    pub(crate) args: Vec<Arg>,
}

/// A kernel's work on one of many tensors.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Task {
    /// Blocks along x.
    pub(crate) blocks: usize,
    /// Addresses and numbers, in the order of the fields of the kernel's `Task` behind the first: addresses and 64-bit numbers come
    /// before 32-bit numbers, so that nothing lies between them.
    pub(crate) args: Vec<Arg>,
}

/// One kernel that works on many tensors. Its parameters are the array of its tasks and how many there are.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tasks {
    /// Where its text is.
    pub(crate) source: Source,
    /// Its name there.
    pub(crate) name: &'static str,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// In the order of the tensors; one without blocks is left out.
    pub(crate) tasks: Vec<Task>,
}

/// One thing to put on the stream.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// Launch a kernel; one without blocks is left out.
    Kernel(Kernel),
    /// Launch a kernel over many tensors.
    Tasks(Tasks),
    /// Set bytes to zero.
    Clear {
        /// The first one.
        at: Arg,
        /// How many.
        bytes: usize,
    },
}

impl Action {
    /// Whether it launches a kernel.
    pub(crate) fn is_kernel(&self) -> bool {
        match self {
            Action::Kernel(_) | Action::Tasks(_) => true,
            Action::Clear { .. } => false,
        }
    }
}

/// What a launch does of a node that is joined to its own, before it or behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Joint {
    /// Nothing.
    #[default]
    None,
    /// All of it; the results of the first of the two are stored.
    Stored,
    /// All of it; the results of the first of the two, which only the second reads, are not stored.
    Unstored,
}

/// The work of a node.
#[derive(Default)]
pub(crate) struct Launch {
    /// Bytes of scratch memory.
    pub(crate) scratch: usize,
    /// In order.
    pub(crate) actions: Vec<Action>,
    /// If kernels of it note rejected values.
    pub(crate) rejects: Option<Rejects>,
    /// Of the node behind that was offered. Its operands and results follow the node's.
    pub(crate) behind: Joint,
    /// Of the node before that was offered. Its operands and results follow those.
    pub(crate) before: Joint,
    /// Of the twin that was offered, and its results where a chain is behind it.
    pub(crate) twin: Joint,
    /// Of the combine that was offered, and of the chain behind that.
    pub(crate) combined: Joint,
    pub(crate) behind_combined: Joint,
    /// How many counters it has in an instance's memory: u32, 0 before the first run, which every run leaves at 0.
    pub(crate) counters: usize,
    /// Of a product, the rule by which it got these kernels and tiles, in words.
    pub(crate) why: Option<String>,
}

/// The most blocks along y or z of a grid.
const MOST_YZ: usize = 65_535;
/// The most blocks along x of a grid.
const MOST_X: usize = i32::MAX as usize;

impl Launch {
    /// Work without scratch memory.
    pub(crate) fn of(actions: Vec<Action>) -> Launch {
        Launch { actions, ..Launch::default() }
    }

    /// One kernel without scratch memory.
    pub(crate) fn one(source: Source, name: &'static str, grid: [usize; 3], threads: u32, args: Vec<Arg>) -> Launch {
        Launch::of(vec![kernel(source, name, grid, threads, args)])
    }

    /// With this much scratch memory.
    #[must_use]
    pub(crate) fn with_scratch(mut self, bytes: usize) -> Launch {
        self.scratch = bytes;
        self
    }

    /// Chosen by this rule.
    #[must_use]
    pub(crate) fn because(mut self, why: String) -> Launch {
        self.why = Some(why);
        self
    }

    /// Whose kernels note values they reject.
    #[must_use]
    pub(crate) fn rejecting(mut self, wanted: String, found: &'static str) -> Launch {
        self.rejects = Some(Rejects { wanted, found });
        self
    }

    /// The launch itself, if every grid is one that a GPU takes.
    ///
    /// # Errors
    /// What is wanted instead.
    pub(crate) fn checked(mut self) -> Result<Launch, String> {
        for action in &mut self.actions {
            let (name, [x, y, z]) = match action {
                Action::Kernel(k) => (k.name, k.grid),
                Action::Tasks(t) => {
                    t.tasks.retain(|task| task.blocks > 0);
                    (t.name, [t.tasks.iter().map(|task| task.blocks).sum(), 1, 1])
                }
                Action::Clear { .. } => continue,
            };
            if x > MOST_X || y > MOST_YZ || z > MOST_YZ {
                return Err(format!(
                    "sizes for which {name} has at most {MOST_X} x {MOST_YZ} x {MOST_YZ} blocks, not {x} x {y} x {z}"
                ));
            }
        }
        self.actions.retain(|action| match action {
            Action::Kernel(k) => k.grid.iter().all(|&n| n > 0),
            Action::Tasks(t) => !t.tasks.is_empty(),
            Action::Clear { bytes, .. } => *bytes > 0,
        });
        Ok(self)
    }
}

/// A kernel, with the shared memory of its text alone, as an action.
pub(crate) fn kernel(source: Source, name: &'static str, grid: [usize; 3], threads: u32, args: Vec<Arg>) -> Action {
    Action::Kernel(Kernel { source, name, grid, threads, shared: 0, args })
}

/// Places in scratch memory handed out one after another, each at a multiple of 128 bytes.
#[derive(Default)]
pub(crate) struct Scratch {
    used: usize,
}

impl Scratch {
    /// `bytes` more.
    pub(crate) fn take(&mut self, bytes: usize) -> Arg {
        let at = self.used;
        self.used += bytes.next_multiple_of(128);
        Arg::Scratch(at)
    }

    /// All of them together.
    pub(crate) fn bytes(&self) -> usize {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_work_is_left_out_and_too_large_grids_are_refused() {
        let with = |grid| {
            let source = Source::generated("test.cu", &[], String::new());
            Launch::one(source, "f", grid, 32, vec![]).checked()
        };
        assert_eq!(with([3, 0, 1]).map(|l| l.actions.len()), Ok(0));
        assert_eq!(with([3, 2, 1]).map(|l| l.actions.len()), Ok(1));
        let Err(wanted) = with([1, 70_000, 1]) else { panic!("70000 blocks along y") };
        assert!(wanted.contains("70000"), "{wanted}");
    }

    #[test]
    fn parts_of_scratch_memory_do_not_touch() {
        let mut scratch = Scratch::default();
        assert_eq!(
            (scratch.take(5), scratch.take(128), scratch.take(1)),
            (Arg::Scratch(0), Arg::Scratch(128), Arg::Scratch(256))
        );
        assert_eq!(scratch.bytes(), 384);
    }
}
