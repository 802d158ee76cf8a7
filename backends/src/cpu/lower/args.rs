//! What a launch is given: the memory of its operands, results and scratch.

use bytemuck::Pod;

use crate::places::Place;

/// A value a kernel rejected.
pub(crate) struct Rejected {
    pub(crate) wanted: String,
    pub(crate) found: String,
}

type Run = dyn Fn(&Args<'_>) -> Result<(), Rejected> + Send + Sync;

/// A kernel with everything decided that the graph decides.
pub(crate) struct Launch {
    /// Bytes of scratch memory it needs.
    pub(crate) scratch: usize,
    pub(crate) run: Box<Run>,
}

impl Launch {
    /// A launch that cannot reject anything.
    pub(crate) fn new(scratch: usize, run: impl Fn(&Args<'_>) + Send + Sync + 'static) -> Launch {
        Launch::fallible(scratch, move |args| {
            run(args);
            Ok(())
        })
    }

    /// A launch that may reject a value.
    pub(crate) fn fallible(
        scratch: usize,
        run: impl Fn(&Args<'_>) -> Result<(), Rejected> + Send + Sync + 'static,
    ) -> Launch {
        Launch { scratch, run: Box::new(run) }
    }
}

/// The memory of one step.
///
/// The slices handed out rest on the plan: it gives every value of a step memory of its type's size and alignment, which no
/// other value of the step overlaps, except where an op works in place. Such an op must take the shared memory once, as
/// [`Args::result`] or by [`Args::operand_ptr`] and [`Args::result_ptr`], never also as [`Args::operand`].
pub(crate) struct Args<'a> {
    arena: *mut u8,
    states: &'a [*mut u8],
    operands: &'a [Place],
    results: &'a [Place],
    scratch: (usize, usize),
}

impl<'a> Args<'a> {
    pub(crate) fn new(
        arena: *mut u8,
        states: &'a [*mut u8],
        operands: &'a [Place],
        results: &'a [Place],
        scratch: (usize, usize),
    ) -> Self {
        Args { arena, states, operands, results, scratch }
    }

    fn at(&self, place: Place) -> *mut u8 {
        match place {
            // SAFETY: planned offsets lie inside the arena.
            Place::Arena(offset) => unsafe { self.arena.add(offset) },
            Place::State(i) => self.states[i],
        }
    }

    /// Address of an operand.
    pub(crate) fn operand_ptr(&self, i: usize) -> *const u8 {
        self.at(self.operands[i])
    }

    /// Address of a result.
    pub(crate) fn result_ptr(&self, i: usize) -> *mut u8 {
        self.at(self.results[i])
    }

    /// Operand `i`, of `len` elements.
    pub(crate) fn operand<T: Pod>(&self, i: usize, len: usize) -> &'a [T] {
        // SAFETY: see the type: planned memory of this value's type, not written during the step.
        unsafe { std::slice::from_raw_parts(self.operand_ptr(i).cast(), len) }
    }

    /// Operand `i`, if there is one.
    pub(crate) fn optional<T: Pod>(&self, i: usize, len: usize) -> Option<&'a [T]> {
        (i < self.operands.len()).then(|| self.operand(i, len))
    }

    /// Result `i`, of `len` elements; take each result once.
    pub(crate) fn result<T: Pod>(&self, i: usize, len: usize) -> &'a mut [T] {
        // SAFETY: see the type: planned memory of this value's type that nothing else reads or writes during the step.
        unsafe { std::slice::from_raw_parts_mut(self.result_ptr(i).cast(), len) }
    }

    /// The whole scratch memory; take it once.
    pub(crate) fn scratch<T: Pod>(&self) -> &'a mut [T] {
        // SAFETY: planned memory that belongs to this step alone, aligned for any element.
        unsafe {
            std::slice::from_raw_parts_mut(self.arena.add(self.scratch.0).cast(), self.scratch.1 / size_of::<T>())
        }
    }
}
