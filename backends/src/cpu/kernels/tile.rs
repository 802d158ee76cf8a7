//! What the attention and loss kernels share: products of small f32 tiles, sharing tasks out over threads with a piece
//! of workspace each.
//!
//! Tiles are laid out so that the vector lanes run over rows of the result (queries, tokens), which need no sum across
//! lanes: a softmax over keys or vocabulary is then plain elementwise work.

use std::any::TypeId;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use crate::cpu::element::Element;

/// Rows of a tile in either direction. 64 x 64 floats are 16 KiB: the tiles of one product fit the L2 cache with room.
pub(super) const TILE: usize = 64;
/// Lane counts are multiples of this (one AVX-512 register).
pub(super) const LANES: usize = 16;

/// `n` rounded up to whole registers.
pub(super) const fn lanes(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// The left operand of [`product`]: element (i, p) is `data[i * row + p * step]`. It is read one scalar at a time.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [f32],
    pub(super) row: usize,
    pub(super) step: usize,
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing.
    Zero,
    /// The values in C.
    Keep,
    /// The values in C, each column multiplied by its factor first.
    Scaled(&'a [f32]),
}

/// c [m, n] = start + left [m, k] * b [k, n], rows of b and c being `ldb` and `ldc` apart; n in whole [`LANES`], or 1.
///
/// Each element is one chain of multiply-adds over k in order, so its bits depend neither on m and n nor on its place.
///
/// # Panics
/// If a slice is too short (a bug of the calling kernel).
pub(super) fn product(
    [m, n, k]: [usize; 3],
    left: Left<'_>,
    (b, ldb): (&[f32], usize),
    start: Start<'_>,
    (c, ldc): (&mut [f32], usize),
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(n.is_multiple_of(LANES) || n == 1, "tile product of {n} columns");
    assert!(c.len() >= (m - 1) * ldc + n && (m == 1 || ldc >= n));
    if k > 0 {
        assert!(b.len() >= (k - 1) * ldb + n);
        assert!(left.data.len() > (m - 1) * left.row + (k - 1) * left.step);
    }
    if let Start::Scaled(factor) = start {
        assert!(factor.len() >= n);
    }
    let args = Args { m, n, k, left, b: b.as_ptr(), ldb, start, c: c.as_mut_ptr(), ldc };
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: the features were just found; the bounds were checked above.
            return unsafe { product_avx512(args) };
        }
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: as above.
            return unsafe { product_avx2(args) };
        }
    }
    // SAFETY: the bounds were checked above.
    unsafe { blocks::<[f32; 4], f32, 4, 4, 4>(args) }
}

#[derive(Clone, Copy)]
struct Args<'a> {
    m: usize,
    n: usize,
    k: usize,
    left: Left<'a>,
    b: *const f32,
    ldb: usize,
    start: Start<'a>,
    c: *mut f32,
    ldc: usize,
}

/// # Safety
/// The CPU has AVX-512F and FMA; the operands hold what [`product`] checks.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn product_avx512(args: Args<'_>) {
    // SAFETY: passed on. 8 x 2 of the 32 registers are accumulators.
    unsafe { blocks::<x86::Zmm, x86::Scalar, 8, 2, 1>(args) }
}

/// # Safety
/// The CPU has AVX2 and FMA; the operands hold what [`product`] checks.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn product_avx2(args: Args<'_>) {
    // SAFETY: passed on. 6 x 2 of the 16 registers are accumulators.
    unsafe { blocks::<x86::Ymm, x86::Scalar, 6, 2, 2>(args) }
}

/// A vector register of f32. The methods are for code compiled for the register's instructions.
trait Register: Copy {
    const WIDTH: usize;
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// As `splat`, and `WIDTH` elements can be read.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// As `splat`, and `WIDTH` elements can be written.
    unsafe fn store(self, to: *mut f32);
    /// # Safety
    /// As `splat`.
    unsafe fn mul(self, other: Self) -> Self;
    /// self + a b, rounded once where the CPU can.
    ///
    /// # Safety
    /// As `splat`.
    unsafe fn plus_product(self, a: Self, b: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Register;

    macro_rules! register {
        ($name:ident, $inner:ty, $width:literal, $splat:expr, $load:expr, $store:expr, $mul:expr, $fma:expr) => {
            #[derive(Clone, Copy)]
            pub(super) struct $name($inner);
            impl Register for $name {
                const WIDTH: usize = $width;
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: the caller has the instructions and valid pointers.
                    unsafe { $name($splat(x)) }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: the caller has the instructions and valid pointers.
                    unsafe { $name($load(from)) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: the caller has the instructions and valid pointers.
                    unsafe { $store(to, self.0) }
                }
                #[inline(always)]
                unsafe fn mul(self, other: Self) -> Self {
                    // SAFETY: the caller has the instructions and valid pointers.
                    unsafe { $name($mul(self.0, other.0)) }
                }
                #[inline(always)]
                unsafe fn plus_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: the caller has the instructions and valid pointers.
                    unsafe { $name($fma(a.0, b.0, self.0)) }
                }
            }
        };
    }
    register!(Zmm, __m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_mul_ps, _mm512_fmadd_ps);
    register!(Ymm, __m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_mul_ps, _mm256_fmadd_ps);
    register!(Scalar, __m128, 1, _mm_set_ss, _mm_load_ss, _mm_store_ss, _mm_mul_ss, _mm_fmadd_ss);
}

/// Multiply-add where the compiler knows the target to have it; elsewhere it would be a library call.
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

impl Register for f32 {
    const WIDTH: usize = 1;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's pointer is valid.
        unsafe { *from }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's pointer is valid.
        unsafe { *to = self }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self * other
    }
    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        multiply_add(a, b, self)
    }
}

impl Register for [f32; 4] {
    const WIDTH: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's pointer is valid for four elements.
        unsafe { *from.cast::<[f32; 4]>() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's pointer is valid for four elements.
        unsafe { *to.cast::<[f32; 4]>() = self }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        std::array::from_fn(|x| self[x] * other[x])
    }
    #[inline(always)]
    unsafe fn plus_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|x| multiply_add(a[x], b[x], self[x]))
    }
}

/// Cuts c into blocks of MR rows and NV registers W; what is left of the columns into blocks of [`LANES`], LV registers,
/// and a single column into registers S of width 1.
///
/// # Safety
/// The CPU has the instructions of W and S; the operands hold what [`product`] checks.
#[inline(always)]
unsafe fn blocks<W: Register, S: Register, const MR: usize, const NV: usize, const LV: usize>(args: Args<'_>) {
    const { assert!(LV * W::WIDTH == LANES && S::WIDTH == 1) }
    let mut j = 0;
    while j + NV * W::WIDTH <= args.n {
        // SAFETY: the columns of the block are within n.
        unsafe { rows::<W, MR, NV>(args, j) };
        j += NV * W::WIDTH;
    }
    while j + LANES <= args.n {
        // SAFETY: the columns of the block are within n.
        unsafe { rows::<W, MR, LV>(args, j) };
        j += LANES;
    }
    while j < args.n {
        // SAFETY: the columns of the block are within n.
        unsafe { rows::<S, 8, 1>(args, j) };
        j += 1;
    }
}

/// # Safety
/// As [`blocks`], and the columns from j on are within n.
#[inline(always)]
unsafe fn rows<R: Register, const MR: usize, const NV: usize>(args: Args<'_>, j: usize) {
    let mut i = 0;
    while i + MR <= args.m {
        // SAFETY: the rows of the block are within m.
        unsafe { micro::<R, MR, NV>(args, i, j) };
        i += MR;
    }
    while i + 4 <= args.m {
        // SAFETY: the rows of the block are within m.
        unsafe { micro::<R, 4, NV>(args, i, j) };
        i += 4;
    }
    while i < args.m {
        // SAFETY: the rows of the block are within m.
        unsafe { micro::<R, 1, NV>(args, i, j) };
        i += 1;
    }
}

/// # Safety
/// As [`rows`], and i + MR <= m.
#[inline(always)]
unsafe fn micro<R: Register, const MR: usize, const NV: usize>(args: Args<'_>, i: usize, j: usize) {
    let Args { k, left, b, ldb, start, c, ldc, .. } = args;
    // SAFETY: (i + r, j + x) is inside c, (p, j + x) inside b and (i + r, p) inside left, as the caller promises.
    unsafe {
        let c = c.add(i * ldc + j);
        let mut acc = [[R::splat(0.0); NV]; MR];
        match start {
            Start::Zero => {}
            Start::Keep => {
                for r in 0..MR {
                    for x in 0..NV {
                        acc[r][x] = R::load(c.add(r * ldc + x * R::WIDTH));
                    }
                }
            }
            Start::Scaled(factor) => {
                for x in 0..NV {
                    let factor = R::load(factor.as_ptr().add(j + x * R::WIDTH));
                    for r in 0..MR {
                        acc[r][x] = R::load(c.add(r * ldc + x * R::WIDTH)).mul(factor);
                    }
                }
            }
        }
        let mut scalars = left.data.as_ptr().add(i * left.row);
        let mut right = b.add(j);
        for _ in 0..k {
            let mut vectors = [R::splat(0.0); NV];
            for x in 0..NV {
                vectors[x] = R::load(right.add(x * R::WIDTH));
            }
            for r in 0..MR {
                let scalar = R::splat(*scalars.add(r * left.row));
                for x in 0..NV {
                    acc[r][x] = acc[r][x].plus_product(scalar, vectors[x]);
                }
            }
            // Wrapping: after the last round they point past the operands and are not read.
            scalars = scalars.wrapping_add(left.step);
            right = right.wrapping_add(ldb);
        }
        for r in 0..MR {
            for x in 0..NV {
                acc[r][x].store(c.add(r * ldc + x * R::WIDTH));
            }
        }
    }
}

/// The elements as f32 without a copy, if they are f32.
#[inline(always)]
pub(super) fn as_f32<T: Element>(elements: &[T]) -> Option<&[f32]> {
    (TypeId::of::<T>() == TypeId::of::<f32>()).then(|| bytemuck::cast_slice(elements))
}

/// Copies `rows` rows of `width` elements, `ld_in` apart, to f32 rows `ld_out` apart.
#[inline(always)]
pub(super) fn load_rows<T: Element>(
    rows: usize,
    width: usize,
    (src, ld_in): (&[T], usize),
    scale: f32,
    (dst, ld_out): (&mut [f32], usize),
) {
    for r in 0..rows {
        let from = &src[r * ld_in..][..width];
        let to = &mut dst[r * ld_out..][..width];
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32() * scale;
        }
    }
}

/// Copies `rows` (at most [`TILE`]) rows of `width` f32, `ld_in` apart, to the lanes of `dst` [width, TILE]: element
/// (r, d) goes to d * TILE + r. Lanes from `rows` up to the next multiple of [`LANES`] become 0.
#[inline(always)]
pub(super) fn transpose(rows: usize, width: usize, (src, ld_in): (&[f32], usize), dst: &mut [f32]) {
    let full = rows / LANES * LANES;
    for r in (0..full).step_by(LANES) {
        let from: [&[f32]; LANES] = std::array::from_fn(|x| &src[(r + x) * ld_in..][..width]);
        for d in 0..width {
            let to = &mut dst[d * TILE + r..][..LANES];
            for x in 0..LANES {
                to[x] = from[x][d];
            }
        }
    }
    if full < rows {
        for d in 0..width {
            let to = &mut dst[d * TILE + full..][..LANES];
            for x in 0..LANES {
                to[x] = if full + x < rows { src[(full + x) * ld_in + d] } else { 0.0 };
            }
        }
    }
}

/// A slice that several tasks write, each its own elements.
#[derive(Clone, Copy)]
pub(super) struct Shared<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: it hands out pieces only through `piece`, whose callers promise that no two tasks have the same elements.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares `data` out; it must outlive every piece.
    pub(super) fn new(data: &mut [T]) -> Self {
        Shared { data: data.as_mut_ptr(), len: data.len() }
    }

    /// Elements [start, start + len).
    ///
    /// # Safety
    /// The slice is still borrowed by the kernel, and no other live piece, in any task, overlaps this one.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // Disjointness is the callers' promise.
    pub(super) unsafe fn piece(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: in bounds, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// The workspace of `threads` threads with `per_thread` f32 each, with room to align each part to a cache line.
pub(super) const fn workspace_of(threads: usize, per_thread: usize) -> usize {
    let threads = if threads == 0 { 1 } else { threads };
    threads * (lanes(per_thread) + LANES)
}

/// Runs `task(i, scratch)` for i in 0..tasks, on as many threads as `workspace` has parts for ([`workspace_of`]), or on
/// the calling one if `parallel` is false. Tasks go to whichever thread is free, so each must write its own output.
///
/// # Panics
/// If `workspace` has no room for one thread (a bug of the caller).
pub(super) fn share_out(
    tasks: usize,
    parallel: bool,
    workspace: &mut [f32],
    per_thread: usize,
    task: impl Fn(usize, &mut [f32]) + Sync,
) {
    let part = workspace_of(1, per_thread);
    assert!(workspace.len() >= part, "a workspace of {} f32 where {part} are needed", workspace.len());
    let aligned = |scratch: &mut [f32]| -> usize { scratch.as_ptr().align_offset(64).min(LANES) };
    if !parallel || tasks <= 1 || workspace.len() < 2 * part {
        let skip = aligned(workspace);
        for i in 0..tasks {
            task(i, &mut workspace[skip..skip + per_thread]);
        }
        return;
    }
    let next = AtomicUsize::new(0);
    let parts = (workspace.len() / part).min(tasks);
    workspace[..parts * part].par_chunks_exact_mut(part).with_max_len(1).for_each(|scratch| {
        let skip = aligned(scratch);
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            task(i, &mut scratch[skip..skip + per_thread]);
        }
    });
}

/// Cuts the first `n` elements off `scratch`.
pub(super) fn cut<'a>(scratch: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(scratch).split_at_mut(n);
    *scratch = tail;
    head
}

#[cfg(test)]
#[path = "tile_tests.rs"]
mod tests;
