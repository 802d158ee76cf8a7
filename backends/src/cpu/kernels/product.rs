//! Products of small f32 tiles, each element one chain of multiply-adds in a fixed order, and their transposes in registers.

use crate::cpu::kernels::tile::LANES;

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
    /// The values in C, each row multiplied by its factor first.
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
        assert!(factor.len() >= m);
    }
    let args = Args { m, n, k, left, b: b.as_ptr(), ldb, start, c: c.as_mut_ptr(), ldc };
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: the features were just found; the bounds were checked above.
            return unsafe { product_avx512(args) };
        }
        if has_avx2() {
            // SAFETY: as above.
            return unsafe { product_avx2(args) };
        }
    }
    // SAFETY: the bounds were checked above.
    unsafe { blocks::<[f32; 4], f32, 4, 4, 4>(args, 0) }
}

/// c[i] = sum over p of rows[i * ld + p] * x[p] for i in 0..count: what [`product`] gives for one column, bit for bit,
/// but with the lanes over the rows, which are transposed in registers.
///
/// # Panics
/// If a slice is too short (a bug of the calling kernel).
pub(super) fn dots(count: usize, k: usize, (rows, ld): (&[f32], usize), x: &[f32], c: &mut [f32]) {
    assert!(x.len() >= k && c.len() >= count);
    assert!(count == 0 || rows.len() >= (count - 1) * ld + k);
    #[allow(unused_mut)] // On other machines than x86-64 nothing is done before the product.
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        done = count / 8 * 8;
        // SAFETY: the features were just found; rows, x and c hold the first `done` rows.
        unsafe { x86::dots(done, k, rows.as_ptr(), ld, x.as_ptr(), c.as_mut_ptr()) };
    }
    if done < count {
        let left = Left { data: &rows[done * ld..], row: ld, step: 1 };
        product([count - done, 1, k], left, (x, 1), Start::Zero, (&mut c[done..count], 1));
    }
}

/// Element (r, d) of the first columns of `from` [rows, width], rows `ld` apart and a multiple of 8 of them, goes to `to[d * ld_to + r]`.
/// Returns how many columns those are: where registers can be transposed, whole eights.
///
/// # Panics
/// If a slice is too short (a bug of the calling kernel).
#[inline(always)]
pub(super) fn transpose_squares(
    [rows, width]: [usize; 2],
    (from, ld): (&[f32], usize),
    (to, ld_to): (&mut [f32], usize),
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        let columns = width / 8 * 8;
        if rows == 0 || columns == 0 {
            return columns;
        }
        assert!(
            rows.is_multiple_of(8)
                && from.len() >= (rows - 1) * ld + columns
                && to.len() >= (columns - 1) * ld_to + rows
        );
        // SAFETY: the features were just found; the slices hold the elements.
        unsafe { x86::transpose(rows, columns, from.as_ptr(), ld, to.as_mut_ptr(), ld_to) };
        return columns;
    }
    let _ = (rows, width, from, ld, to, ld_to);
    0
}

/// Whether the instructions of `product_avx2` and of transposes are there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
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
    // SAFETY: passed on. 6 x 4 or 8 x 2 of the 32 registers are accumulators; a single row takes 4 to hide their latency.
    unsafe {
        if args.m == 1 {
            blocks::<x86::Zmm, x86::Scalar, 1, 4, 1>(args, 0)
        } else {
            let wide = columns::<x86::Zmm, 6, 4>(args, 0);
            blocks::<x86::Zmm, x86::Scalar, 8, 2, 1>(args, wide)
        }
    }
}

/// # Safety
/// The CPU has AVX2 and FMA; the operands hold what [`product`] checks.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn product_avx2(args: Args<'_>) {
    // SAFETY: passed on. 6 x 2 of the 16 registers are accumulators; a single row takes 8 to hide their latency.
    unsafe {
        if args.m == 1 {
            blocks::<x86::Ymm, x86::Scalar, 1, 8, 2>(args, 0)
        } else {
            blocks::<x86::Ymm, x86::Scalar, 6, 2, 2>(args, 0)
        }
    }
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

    /// # Safety
    /// The CPU has AVX2 and FMA; `count` is a multiple of 8; `rows` has `count` rows of k elements, `ld` apart, `x` has k
    /// elements and `c` has `count`.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn dots(count: usize, k: usize, rows: *const f32, ld: usize, x: *const f32, c: *mut f32) {
        let mut i = 0;
        // SAFETY: blocks of 32, then of 8 rows, within `count`.
        unsafe {
            while i + 32 <= count {
                dots_block::<4>(k, rows.add(i * ld), ld, x, c.add(i));
                i += 32;
            }
            while i < count {
                dots_block::<1>(k, rows.add(i * ld), ld, x, c.add(i));
                i += 8;
            }
        }
    }

    /// [`dots`] of N * 8 rows: N chains of multiply-adds at a time, to hide their latency.
    ///
    /// # Safety
    /// As [`dots`].
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn dots_block<const N: usize>(k: usize, rows: *const f32, ld: usize, x: *const f32, c: *mut f32) {
        let mut sums = [_mm256_setzero_ps(); N];
        let full = k / 8 * 8;
        // SAFETY: the rows are below N * 8 and the columns below k.
        unsafe {
            for p in (0..full).step_by(8) {
                for (block, sum) in sums.iter_mut().enumerate() {
                    let columns = transposed(rows.add(block * 8 * ld + p), ld);
                    for (j, column) in columns.into_iter().enumerate() {
                        *sum = _mm256_fmadd_ps(column, _mm256_broadcast_ss(&*x.add(p + j)), *sum);
                    }
                }
            }
            for p in full..k {
                for (block, sum) in sums.iter_mut().enumerate() {
                    let mut column = [0.0f32; 8];
                    for (r, value) in column.iter_mut().enumerate() {
                        *value = *rows.add((block * 8 + r) * ld + p);
                    }
                    let column = _mm256_loadu_ps(column.as_ptr());
                    *sum = _mm256_fmadd_ps(column, _mm256_broadcast_ss(&*x.add(p)), *sum);
                }
            }
            for (block, sum) in sums.into_iter().enumerate() {
                _mm256_storeu_ps(c.add(block * 8), sum);
            }
        }
    }

    /// Element (r, d) of `from`, rows `ld` apart, goes to `to[d * ld_to + r]`.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA; `rows` and `columns` are multiples of 8; the elements can be read and written.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn transpose(
        rows: usize,
        columns: usize,
        from: *const f32,
        ld: usize,
        to: *mut f32,
        ld_to: usize,
    ) {
        for r in (0..rows).step_by(8) {
            for d in (0..columns).step_by(8) {
                // SAFETY: the block is inside both.
                unsafe {
                    for (i, column) in transposed(from.add(r * ld + d), ld).into_iter().enumerate() {
                        _mm256_storeu_ps(to.add((d + i) * ld_to + r), column);
                    }
                }
            }
        }
    }

    /// The 8 columns of an 8 x 8 block whose rows are `ld` apart.
    ///
    /// # Safety
    /// The CPU has AVX2; the block can be read.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn transposed(rows: *const f32, ld: usize) -> [__m256; 8] {
        let mut columns = [_mm256_setzero_ps(); 8];
        for half in 0..2 {
            // Rows r and r + 4 share a register, so that the rest stays within 128-bit halves.
            // SAFETY: 4 elements of rows r and r + 4 of the block.
            let [a, b, c, d] = [0, 1, 2, 3].map(|r| unsafe {
                let low = _mm_loadu_ps(rows.add(r * ld + half * 4));
                _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), _mm_loadu_ps(rows.add((r + 4) * ld + half * 4)))
            });
            let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            columns[half * 4] = _mm256_shuffle_ps::<0x44>(ab_low, cd_low);
            columns[half * 4 + 1] = _mm256_shuffle_ps::<0xee>(ab_low, cd_low);
            columns[half * 4 + 2] = _mm256_shuffle_ps::<0x44>(ab_high, cd_high);
            columns[half * 4 + 3] = _mm256_shuffle_ps::<0xee>(ab_high, cd_high);
        }
        columns
    }
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

/// Cuts c from column j on into blocks of MR rows and NV registers W; what is left of the columns into blocks of [`LANES`], LV
/// registers, and a single column into registers S of width 1.
///
/// # Safety
/// The CPU has the instructions of W and S; the operands hold what [`product`] checks.
#[inline(always)]
unsafe fn blocks<W: Register, S: Register, const MR: usize, const NV: usize, const LV: usize>(
    args: Args<'_>,
    j: usize,
) {
    const { assert!(LV * W::WIDTH == LANES && S::WIDTH == 1) }
    // SAFETY: passed on.
    unsafe {
        let j = columns::<W, MR, NV>(args, j);
        let j = columns::<W, MR, LV>(args, j);
        columns::<S, 8, 1>(args, j);
    }
}

/// Cuts c from column j on into blocks of MR rows and NV registers R, as far as there are whole ones. Returns the column behind them.
///
/// # Safety
/// As [`blocks`].
#[inline(always)]
unsafe fn columns<R: Register, const MR: usize, const NV: usize>(args: Args<'_>, mut j: usize) -> usize {
    while j + NV * R::WIDTH <= args.n {
        // SAFETY: the columns of the block are within n.
        unsafe { rows::<R, MR, NV>(args, j) };
        j += NV * R::WIDTH;
    }
    j
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
                for r in 0..MR {
                    let factor = R::splat(*factor.as_ptr().add(i + r));
                    for x in 0..NV {
                        acc[r][x] = R::load(c.add(r * ldc + x * R::WIDTH)).mul(factor);
                    }
                }
            }
        }
        // Rows are found from every third one, without a sum of addresses for each.
        let mut scalars: [*const f32; MR] =
            std::array::from_fn(|r| left.data.as_ptr().wrapping_add((i + r / 3 * 3) * left.row));
        let mut right = b.add(j);
        for _ in 0..k {
            let mut vectors = [R::splat(0.0); NV];
            for x in 0..NV {
                vectors[x] = R::load(right.add(x * R::WIDTH));
            }
            for r in 0..MR {
                let scalar = R::splat(*scalars[r].add(r % 3 * left.row));
                for x in 0..NV {
                    acc[r][x] = acc[r][x].plus_product(scalar, vectors[x]);
                }
            }
            // Wrapping: after the last round they point past the operands and are not read.
            for scalar in &mut scalars {
                *scalar = scalar.wrapping_add(left.step);
            }
            right = right.wrapping_add(ldb);
        }
        for r in 0..MR {
            for x in 0..NV {
                acc[r][x].store(c.add(r * ldc + x * R::WIDTH));
            }
        }
    }
}

#[cfg(test)]
#[path = "product_tests.rs"]
mod tests;
