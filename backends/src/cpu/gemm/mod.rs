//! Matrix multiplication: plain, batched, M-grouped and K-grouped, on one core.
//!
//! One [`Gemm`] describes a whole batch of problems `C = A · B (+ C) (+ bias)`; [`gemm`] cuts the blocks of all of
//! them into one list of tasks that the threads draw from, so that a skewed load of experts balances by itself.
//!
//! **The summation order is fixed.** Every element of C is one chain of f32 fused multiply-adds over `k = 0, 1, ..`,
//! starting from 0 (from C when accumulating), then the bias is added and the result rounded
//! once. It depends on K alone: not on M, N, the row's place in a segment, the strides, the number of threads or the
//! kernel that ran. So a token's result does not depend on its batch. (Without FMA hardware the chain multiplies and
//! adds with two roundings; still one order, but not the bits of a machine with FMA.)
//!
//! On a processor with a [`matrix`] unit calls of more than a few rows run there if it is asked for, with an order of their own that depends
//! on K alone likewise. Which of the two orders it is depends on the static shape of the call, never on how many rows are in use.

mod ahead;
mod drive;
mod finish;
mod kernel;
mod matrix;
mod pack;
mod portable;
mod problem;
mod task;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use half::{bf16, f16};

use super::crew;
use super::element::Element;

/// How an operand is stored; arithmetic is always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 4 bytes, exact.
    F32,
    /// 2 bytes: the upper half of an f32.
    Bf16,
    /// 2 bytes: IEEE binary16.
    F16,
}

impl Storage {
    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            Storage::F32 => 4,
            Storage::Bf16 | Storage::F16 => 2,
        }
    }
}

/// An element type with its [`Storage`] tag.
pub trait Stored: Element {
    /// The tag of this type.
    const STORAGE: Storage;
}

impl Stored for f32 {
    const STORAGE: Storage = Storage::F32;
}
impl Stored for bf16 {
    const STORAGE: Storage = Storage::Bf16;
}
impl Stored for f16 {
    const STORAGE: Storage = Storage::F16;
}

/// A matrix to read: element `(i, j)` lies `i * row_stride + j * col_stride` elements after `data`.
/// Any strides are allowed, 0 and negative ones too; a transpose is a swap of the two.
#[derive(Clone, Copy, Debug)]
pub struct Mat {
    /// Element (0, 0); aligned for the element type.
    pub data: *const u8,
    /// Element type.
    pub storage: Storage,
    /// Elements from one row to the next.
    pub row_stride: isize,
    /// Elements from one column to the next.
    pub col_stride: isize,
}

impl Mat {
    /// A matrix at `data` with strides in elements.
    pub fn new<T: Stored>(data: *const T, row_stride: isize, col_stride: isize) -> Self {
        Mat { data: data.cast(), storage: T::STORAGE, row_stride, col_stride }
    }

    /// The same memory with rows and columns swapped.
    pub fn t(self) -> Self {
        Mat { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A matrix to write; strides as in [`Mat`], but no two elements may share memory.
#[derive(Clone, Copy, Debug)]
pub struct MatMut {
    /// Element (0, 0); aligned for the element type.
    pub data: *mut u8,
    /// Element type; results are rounded to it once, to nearest even.
    pub storage: Storage,
    /// Elements from one row to the next.
    pub row_stride: isize,
    /// Elements from one column to the next.
    pub col_stride: isize,
}

impl MatMut {
    /// A matrix at `data` with strides in elements.
    pub fn new<T: Stored>(data: *mut T, row_stride: isize, col_stride: isize) -> Self {
        MatMut { data: data.cast(), storage: T::STORAGE, row_stride, col_stride }
    }
}

/// Which problems one call runs. Steps are in elements of the operand they move.
#[derive(Clone, Copy, Debug)]
pub enum Batch<'a> {
    /// One problem.
    One,
    /// `counts[0] * counts[1]` problems of equal shape; problem `(x, y)` starts `x * step[0] + y * step[1]` elements
    /// into each operand (a step of 0 shares the operand). Its index is `x * counts[1] + y`.
    Strided {
        /// Number of problems along the two batch dimensions.
        counts: [usize; 2],
        /// Steps of A.
        a: [isize; 2],
        /// Steps of B.
        b: [isize; 2],
        /// Steps of C.
        c: [isize; 2],
    },
    /// M-grouped: expert `e` multiplies rows `offsets[e]..offsets[e+1]` of A by its own B into the same rows of C.
    /// Rows of C from `offsets[E]` to M are in no segment and become 0 (they stay when accumulating).
    MGrouped {
        /// `[E+1]`, from 0 upwards, at most M.
        offsets: &'a [i32],
        /// Step from one expert's B to the next.
        b: isize,
    },
    /// K-grouped: expert `e` sums over `k` in `offsets[e]..offsets[e+1]` into its own C; an expert without rows gets a
    /// zero C. This is the weight gradient.
    KGrouped {
        /// `[E+1]`, from 0 upwards, at most K.
        offsets: &'a [i32],
        /// Step from one expert's C to the next.
        c: isize,
    },
}

/// Takes the rows of A (its columns, the K axis, when K-grouped) through a list: `rows[i]` replaces index `i`, and -1
/// stands for zeros. A dispatch fused into the loads.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// `[M]` (`[K]` when K-grouped), each in `-1..source_rows`.
    pub rows: &'a [i32],
    /// How many rows A has.
    pub source_rows: usize,
}

/// A vector `[N]` added to every row of C, one per problem.
#[derive(Clone, Copy, Debug)]
pub struct Bias {
    /// Element 0 of problem 0's vector, contiguous.
    pub data: *const u8,
    /// Element type.
    pub storage: Storage,
    /// Elements from one problem's vector to the next; 0 shares one.
    pub step: isize,
}

/// A part of C that is complete and stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The problem (the expert when grouped; E for the rows in no segment when M-grouped).
    pub problem: usize,
    /// Rows of C (counted from the start of C when M-grouped, else within the problem).
    pub rows: Range<usize>,
    /// Columns of C.
    pub cols: Range<usize>,
}

/// What runs on every element of C once it is stored, while it lies in a near cache. Each element is in one part, parts
/// are of no particular size and come from several threads. It may write the part, and nothing reads that any more.
pub type Finished<'a> = &'a (dyn Fn(Part) + Sync);

/// A batch of matrix multiplications `C = A · B (+ C) (+ bias)`, A `[M,K]`, B `[K,N]`, C `[M,N]`.
#[derive(Clone, Copy)]
pub struct Gemm<'a> {
    /// Rows of A and C; when M-grouped, of all problems together (S).
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A and rows of B; when K-grouped, of all problems together (S). With K = 0 the sum is 0.
    pub k: usize,
    /// Left operand.
    pub a: Mat,
    /// Right operand.
    pub b: Mat,
    /// Result.
    pub c: MatMut,
    /// Which problems.
    pub batch: Batch<'a>,
    /// Rows of A through a list.
    pub gather: Option<Gather<'a>>,
    /// The sums start from what C holds instead of 0.
    pub accumulate: bool,
    /// Added to every row after the sum.
    pub bias: Option<Bias>,
    /// Runs on what is finished.
    pub finished: Option<Finished<'a>>,
}

impl Gemm<'_> {
    /// One plain `C = A · B`, everything else off.
    pub fn new(m: usize, n: usize, k: usize, a: Mat, b: Mat, c: MatMut) -> Self {
        Gemm { m, n, k, a, b, c, batch: Batch::One, gather: None, accumulate: false, bias: None, finished: None }
    }
}

/// Why a [`Gemm`] was refused. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GemmError {
    /// Offsets that are no partition.
    #[error("offsets[{index}] is {found}, but offsets start at 0, never fall and end at most at {bound}")]
    Offsets {
        /// Which entry.
        index: usize,
        /// What it holds.
        found: i32,
        /// The rows there are.
        bound: usize,
    },
    /// Fewer than one entry of offsets.
    #[error("offsets need E+1 entries, but are empty")]
    NoOffsets,
    /// A gather list of the wrong length.
    #[error("the gather list holds {found} rows, but the matmul takes {wanted}")]
    GatherLength {
        /// Entries needed.
        wanted: usize,
        /// Entries found.
        found: usize,
    },
    /// A gathered row that does not exist.
    #[error("the gather list names row {found} at {index}, but A has {rows} rows (-1 stands for zeros)")]
    GatherRow {
        /// Which entry.
        index: usize,
        /// What it holds.
        found: i32,
        /// Rows of A.
        rows: usize,
    },
    /// Too little workspace even for one thread.
    #[error("a workspace of {wanted} bytes is needed, but {found} were given")]
    Workspace {
        /// Bytes one thread needs.
        wanted: usize,
        /// Bytes given.
        found: usize,
    },
}

/// Bytes of workspace for [`gemm`] on `threads` threads ([`gemm_seq`]: 1), for any [`Batch`] whose M, N and K (static
/// bounds, as in [`Gemm`]) are at most these. Any alignment of the workspace is fine. Depends on its arguments and the
/// CPU model only. A smaller workspace that still serves one thread makes [`gemm`] use fewer threads.
pub fn workspace_bytes(m: usize, n: usize, k: usize, c: Storage, threads: usize) -> usize {
    drive::workspace_bytes(kernel::best(), m, n, k, c, threads)
}

/// Runs the batch on the crew that this thread leads (on this thread alone when the work is too small to share).
/// Allocates nothing.
///
/// # Errors
/// [`GemmError`] if offsets, gather list or workspace do not fit; C is untouched then.
///
/// # Safety
/// Every element of A, B, C and bias that the shapes, strides, steps, offsets and gather list reach must lie in live
/// memory of its storage type, aligned for it, initialised where it is read (C is read only when accumulating), and C
/// must overlap neither itself nor an operand nor the workspace. Nothing else may write them during the call.
pub unsafe fn gemm(gemm: &Gemm<'_>, workspace: &mut [u8]) -> Result<(), GemmError> {
    // SAFETY: the caller's contract.
    unsafe { drive::run(kernel::best(), gemm, workspace, crew::threads()) }
}

/// Like [`gemm`] on the calling thread only, for kernels that are already split over threads. Same bits.
///
/// # Errors
/// As [`gemm`].
///
/// # Safety
/// As [`gemm`].
pub unsafe fn gemm_seq(gemm: &Gemm<'_>, workspace: &mut [u8]) -> Result<(), GemmError> {
    // SAFETY: the caller's contract.
    unsafe { drive::run(kernel::best(), gemm, workspace, 1) }
}

/// The instruction set of products in this process: the first of `avx512`, `avx2` and `portable` that the machine has, or the one that the
/// variable `MOEBIUS_CPU` names, which may be `amx` (with AVX-512). All but `amx` give the same bits on machines with fused multiply-add.
///
/// # Errors
/// [`Error::InstructionSet`](crate::Error::InstructionSet) if the machine has none of that name.
pub fn instruction_set() -> crate::Result<&'static str> {
    let asked = std::env::var("MOEBIUS_CPU").ok();
    let chosen = kernel::choose(asked.as_deref());
    let wrong = |there| crate::Error::InstructionSet { found: asked.clone().unwrap_or_default(), there };
    chosen.map(|isa| isa.name).map_err(wrong)
}
