//! Products on a processor's matrix unit (AMX), which multiplies tiles of bf16 and adds up in f32, sixteen times as fast as
//! vectors of f32 do.
//!
//! An f32 is the sum of three bf16, its *parts*: what it rounds to, what the rest rounds to, and what is left then, which is
//! exact, as 3 x 8 bits hold the 24 of an f32. A product of two f32 is nine products of parts, of which the six largest are
//! taken; what the others would add is below 2^-23 of the product, so that the result is as good as that of f32 arithmetic.
//! A bf16 is its own only part, an f16 has two: then fewer products are exact.
//!
//! Each element of C is a sum over blocks of [`STEP`] steps of k. In a block each product of parts (in the order of
//! [`products`]) makes two chains of fused multiply-adds from 0, one over the block's first half and one over its second; their
//! sum is added to the element. This depends on K alone, as everywhere here, but it is not the chain of the other
//! kernels: which of the two is taken depends on the static shape of the call ([`suits`]).
//!
//! The unit takes numbers below the least normal f32 for 0. Where a sum is not finite, the products of parts may be at fault
//! (an infinite number has no parts): it is computed again as the other kernels do.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod split;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

use super::pack::ArgsA;
use super::{Mat, Storage};

/// Steps of k of one instruction.
pub(super) const STEP: usize = 32;
/// Rows and columns of one tile of the unit, the first of f32, the second of f32 or pairs of bf16.
const TILE: usize = 16;
/// Rows and columns of a block of C that stays in the unit: two tiles by two.
pub(super) const SIDE: usize = 2 * TILE;
/// Bytes of one tile.
const TILE_BYTES: usize = TILE * TILE * 4;
/// Bytes of one part of an operand in a step: two tiles.
const PART_BYTES: usize = 2 * TILE_BYTES;
/// Most parts of a number.
pub(super) const MAX_PARTS: usize = 3;
/// Least K and N: below, most of the unit would multiply zeros.
const LEAST: usize = 16;

/// Of how many bf16 a number of this type is the sum.
pub(super) const fn parts(storage: Storage) -> usize {
    match storage {
        Storage::F32 => 3,
        Storage::F16 => 2,
        Storage::Bf16 => 1,
    }
}

/// Bytes of the parts of SIDE rows of A or SIDE columns of B over `k` steps.
pub(super) fn panel_bytes(k: usize, parts: usize) -> usize {
    // The odd cache line keeps panels off each other's L1 sets.
    k.div_ceil(STEP) * parts * PART_BYTES + 64
}

/// Which parts of A and B (0 is the largest) are multiplied, those of the smallest products first: all whose product is not
/// below that of a largest and a smallest part. Neighbours share a part, so that few tiles are loaded.
pub(super) fn products(a: Storage, b: Storage) -> &'static [(usize, usize)] {
    match (parts(a), parts(b)) {
        (3, 3) => &[(0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)],
        (3, 2) => &[(0, 1), (1, 1), (1, 0), (2, 0), (0, 0)],
        (2, 3) => &[(0, 2), (0, 1), (1, 1), (1, 0), (0, 0)],
        (2, 2) => &[(1, 1), (0, 1), (0, 0), (1, 0)],
        (3, _) => &[(2, 0), (1, 0), (0, 0)],
        (_, 3) => &[(0, 2), (0, 1), (0, 0)],
        (2, _) => &[(1, 0), (0, 0)],
        (_, 2) => &[(0, 1), (0, 0)],
        _ => &[(0, 0)],
    }
}

/// Whether calls of this static shape run on the unit: for few rows (a strip) reading B is the work.
pub(super) fn suits(m: usize, n: usize, k: usize, strip_rows: usize) -> bool {
    m > strip_rows && n >= LEAST && k >= LEAST
}

/// A block of B to split: `k x n` elements of `b`, in panels of SIDE columns, `panel_bytes` apart.
pub(super) struct SplitB {
    pub(super) b: Mat,
    pub(super) k: usize,
    pub(super) n: usize,
    pub(super) panel_bytes: usize,
    /// Whether rows of B are contiguous, and whole panels: else `b` must be f32 panels of SIDE columns, filled up with zeros.
    pub(super) in_place: bool,
}

/// A block of C of at most SIDE x SIDE that is computed for some steps of k.
pub(super) struct Block<'a> {
    pub(super) products: &'a [(usize, usize)],
    /// Parts of A and B.
    pub(super) parts: [usize; 2],
    pub(super) steps: usize,
    pub(super) a: *const u8,
    pub(super) b: *const u8,
    pub(super) c: *mut f32,
    /// Floats between rows of C.
    pub(super) ldc: usize,
    pub(super) rows: usize,
    /// Columns are TILE or SIDE; C has room for them.
    pub(super) cols: usize,
    /// Sums go on from what C holds.
    pub(super) load: bool,
}

/// What a processor with such a unit does.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(super) struct Matrix {
    /// Parts of at most SIDE rows of A: for each STEP of k and each part two tiles of TILE rows, TILE pairs of steps p and p + TILE.
    pub(super) split_a: unsafe fn(&ArgsA<'_>, *mut u8),
    /// Parts of columns of B: for each STEP of k and each part two tiles of TILE columns, TILE rows of such pairs.
    pub(super) split_b: unsafe fn(&SplitB, *mut u8),
    /// Computes a block of C.
    pub(super) block: unsafe fn(&Block<'_>),
    /// Leaves the unit as a thread should that does other work.
    pub(super) release: unsafe fn(),
    /// Whether a number of `rows x cols` floats, `ld` apart, is not finite.
    pub(super) any_not_finite: unsafe fn(*const f32, usize, usize, usize) -> bool,
}
