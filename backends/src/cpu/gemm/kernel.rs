//! The micro-kernel, written once over vectors, and the table of its instances for one instruction set.

use std::sync::OnceLock;

use half::{bf16, f16};

use super::ahead::{Ahead, FETCH_STEPS};
use super::finish::{AddBias, LoadTile, StoreTile};
use super::matrix::{Matrix, SIDE};
use super::pack::{PackA, PackB};
use super::{Storage, Stored};

/// Most `k` one packed panel holds: a panel of A (14 rows, 15 KiB) stays in L1 and one of B (32 KiB) in L2.
pub(super) const KC: usize = 256;
/// Floats between the rows of a row-wise panel of A. Not a multiple of 4 KiB, else all rows would share one L1 set.
pub(super) const ROW: usize = KC + 16;
/// Most values in one tile, wide or of a matrix unit.
pub(super) const MAX_TILE: usize = SIDE * SIDE;

/// One instruction set's f32 vectors.
pub(super) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Floats in a vector.
    const LANES: usize;
    /// Floats between the k-steps of a k-wise panel of A, at least the rows of the largest tile: few, as the panel
    /// shares L1 with one of B.
    const COL: usize;
    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once where the hardware can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    unsafe fn store_bf16(p: *mut bf16, v: Self::V);
    unsafe fn load_f16(p: *const f16) -> Self::V;
    unsafe fn store_f16(p: *mut f16, v: Self::V);
    /// Copies `n <= COL` values, converted, from `src` to `dst`, which has room for COL.
    unsafe fn copy_few<T: Source>(src: *const T, n: usize, dst: *mut f32);
    /// Transposes the first LANES vectors as a LANES x LANES matrix.
    unsafe fn transpose(rows: &mut [Self::V; 16]);
    /// The values of pairs of bf16: the lower ones, the upper ones.
    unsafe fn split_bf16(v: Self::V) -> (Self::V, Self::V);
    /// Brings a cache line into L1; any address is fine.
    unsafe fn prefetch(p: *const u8);
    /// Brings a cache line into L2; any address is fine.
    unsafe fn prefetch_l2(p: *const u8);
}

/// A storage type the kernels can read and write in vectors.
pub(super) trait Source: Stored {
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
}

impl Source for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's pointer has LANES elements.
        unsafe { S::load(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: as above.
        unsafe { S::store(p, v) }
    }
}
impl Source for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's pointer has LANES elements.
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: as above.
        unsafe { S::store_bf16(p, v) }
    }
}
impl Source for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        // SAFETY: the caller's pointer has LANES elements.
        unsafe { S::load_f16(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        // SAFETY: as above.
        unsafe { S::store_f16(p, v) }
    }
}

/// `c[MR][NV*LANES] (+)= a · b` over `k` steps: `a(i, p) = a[i*RS + p*CS]`, `b(p, ..) = b[p*b_step ..]`, where `b_step` is known to
/// the compiler for a B that is packed.
/// `AHEAD`: bytes of each row of B to prefetch ahead, for a B that is not packed; 0 for one that is. Then what `next` names is
/// brought near little by little: all at once it would keep B from being loaded.
///
/// `PACKED`: B is packed.
///
/// Where another thread runs on the same core, the core's decoders are shared too, and what is not a multiply-add costs as much as one
/// that is: so a whole panel of packed B, which most of a product's time is, has [`UNROLL`] steps written out, with all addresses of B and
/// of A as constants. Elsewhere memory sets the pace, or little is done, and the compiler's time counts.
///
/// # Safety
/// All pointers but those of `next` cover what the formula reaches; with `load` C is initialised.
#[inline(always)]
pub(super) unsafe fn tile<
    S: Simd,
    T: Source,
    const MR: usize,
    const NV: usize,
    const RS: usize,
    const CS: usize,
    const AHEAD: usize,
    const PACKED: bool,
>(
    k: usize,
    mut a: *const f32,
    mut b: *const T,
    b_step: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
    next: &Ahead,
) {
    // SAFETY: the caller's contract; prefetches and the last, unread steps of `a` and `b` use wrapping arithmetic.
    unsafe {
        let mut acc = [[S::zero(); NV]; MR];
        if load {
            for i in 0..MR {
                for j in 0..NV {
                    acc[i][j] = S::load(c.add(i * ldc + j * S::LANES));
                }
            }
        }
        let (mut left, mut fetched) = (k, 0);
        while left > 0 {
            if AHEAD == 0 {
                if fetched < MR {
                    let row = next.c.wrapping_add(fetched * ldc).cast::<u8>();
                    let mut byte = 0;
                    while byte < NV * S::LANES * 4 {
                        S::prefetch(row.wrapping_add(byte));
                        byte += 64;
                    }
                }
                for lines in [&next.a, &next.b] {
                    let line = lines.from.wrapping_offset(fetched as isize * lines.step);
                    S::prefetch_l2(line);
                    S::prefetch_l2(line.wrapping_offset(lines.second));
                }
                fetched += 1;
            }
            let steps = left.min(FETCH_STEPS);
            left -= steps;
            /// One step of k, the `$p`th from where `a` and `b` are.
            macro_rules! step {
                ($p:expr) => {
                    let b = b.wrapping_add($p * b_step);
                    let mut bv = [S::zero(); NV];
                    for j in 0..NV {
                        bv[j] = T::load::<S>(b.add(j * S::LANES));
                    }
                    let bytes = if AHEAD > 0 { AHEAD } else { PACKED_AHEAD * NV * S::LANES * size_of::<f32>() };
                    let ahead = b.cast::<u8>().wrapping_add(bytes);
                    let mut byte = 0;
                    while byte < NV * S::LANES * size_of::<T>() {
                        S::prefetch(ahead.wrapping_add(byte));
                        byte += 64;
                    }
                    for i in 0..MR {
                        let av = S::splat(*a.add(i * RS + $p * CS));
                        for j in 0..NV {
                            acc[i][j] = S::fma(av, bv[j], acc[i][j]);
                        }
                    }
                };
            }
            let mut single = steps;
            if PACKED && NV * S::LANES == panel_cols(S::LANES) {
                const { assert!(UNROLL == 4) }
                for _ in 0..steps / UNROLL {
                    step!(0);
                    step!(1);
                    step!(2);
                    step!(3);
                    (a, b) = (a.wrapping_add(UNROLL * CS), b.wrapping_add(UNROLL * b_step));
                }
                single = steps % UNROLL;
            }
            for _ in 0..single {
                step!(0);
                (a, b) = (a.wrapping_add(CS), b.wrapping_add(b_step));
            }
        }
        for i in 0..MR {
            for j in 0..NV {
                S::store(c.add(i * ldc + j * S::LANES), acc[i][j]);
            }
        }
    }
}

/// `c[MR][n] (+)= a · b` over K steps, `n` a multiple of LANES: along whole rows of B, K streams that the hardware
/// prefetches, with A in registers. For so few rows that memory is the limit.
///
/// # Safety
/// As [`tile`]; A is row-wise.
#[inline(always)]
pub(super) unsafe fn streams<S: Simd, T: Source, const MR: usize, const K: usize>(
    n: usize,
    a: *const f32,
    b: *const T,
    b_step: usize,
    c: *mut f32,
    ldc: usize,
    load: bool,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut av = [[S::zero(); K]; MR];
        for i in 0..MR {
            for p in 0..K {
                av[i][p] = S::splat(*a.add(i * ROW + p));
            }
        }
        for j in (0..n).step_by(S::LANES) {
            let mut acc = [S::zero(); MR];
            if load {
                for i in 0..MR {
                    acc[i] = S::load(c.add(i * ldc + j));
                }
            }
            for p in 0..K {
                let bv = T::load::<S>(b.add(p * b_step + j));
                for i in 0..MR {
                    acc[i] = S::fma(av[i][p], bv, acc[i]);
                }
            }
            for i in 0..MR {
                S::store(c.add(i * ldc + j), acc[i]);
            }
        }
    }
}

/// `c[MR][LANES] (+)= a · b` over `k` steps, where the columns of B are what is contiguous: `b(p, j) = b[j*stride + p]`.
/// Blocks of LANES x LANES are transposed in registers, so that the chain over k is that of [`tile`].
///
/// # Safety
/// As [`tile`]; A is row-wise.
#[inline(always)]
pub(super) unsafe fn columns<S: Simd, T: Source, const MR: usize>(
    k: usize,
    a: *const f32,
    b: *const T,
    stride: isize,
    c: *mut f32,
    ldc: usize,
    load: bool,
) {
    // SAFETY: the caller's contract; prefetches use wrapping arithmetic.
    unsafe {
        let mut acc = [S::zero(); MR];
        if load {
            for i in 0..MR {
                acc[i] = S::load(c.add(i * ldc));
            }
        }
        // Two bf16 are transposed as one float: half the shuffles.
        let pairs = matches!(T::STORAGE, Storage::Bf16) && cfg!(target_endian = "little");
        let width = if pairs { 2 * S::LANES } else { S::LANES };
        let blocks = k / width * width;
        for p in (0..blocks).step_by(width) {
            let mut v = [S::zero(); 16];
            for j in 0..S::LANES {
                let from = b.offset(j as isize * stride).add(p);
                S::prefetch(from.cast::<u8>().wrapping_add(AHEAD_COLUMNS));
                v[j] = if pairs { S::load(from.cast()) } else { T::load::<S>(from) };
            }
            S::transpose(&mut v);
            let a = a.add(p);
            for q in 0..S::LANES {
                if pairs {
                    let (lower, upper) = S::split_bf16(v[q]);
                    for i in 0..MR {
                        acc[i] = S::fma(S::splat(*a.add(i * ROW + 2 * q)), lower, acc[i]);
                    }
                    for i in 0..MR {
                        acc[i] = S::fma(S::splat(*a.add(i * ROW + 2 * q + 1)), upper, acc[i]);
                    }
                } else {
                    for i in 0..MR {
                        acc[i] = S::fma(S::splat(*a.add(i * ROW + q)), v[q], acc[i]);
                    }
                }
            }
        }
        for p in blocks..k {
            let mut row = [0.0; 16];
            for j in 0..S::LANES {
                row[j] = (*b.offset(j as isize * stride).add(p)).to_f32();
            }
            for i in 0..MR {
                acc[i] = S::fma(S::splat(*a.add(i * ROW + p)), S::load(row.as_ptr()), acc[i]);
            }
        }
        for i in 0..MR {
            S::store(c.add(i * ldc), acc[i]);
        }
    }
}

/// A [`tile`] instance over packed B: `(k, a, b, c, ldc, load, next)`.
pub(super) type TileFn = unsafe fn(usize, *const f32, *const f32, *mut f32, usize, bool, &Ahead);
/// A [`tile`] instance over B in place, of the storage it is listed under: `(k, a, b, b_step, c, ldc, load)`.
pub(super) type WideFn = unsafe fn(usize, *const f32, *const u8, usize, *mut f32, usize, bool);

/// A [`columns`] instance over B of the storage it is listed under: `(k, a, b, stride, c, ldc, load)`.
pub(super) type ColumnsFn = unsafe fn(usize, *const f32, *const u8, isize, *mut f32, usize, bool);

/// A [`streams`] instance for its number of steps of k: `(n, a, b, b_step, c, ldc, load)`.
#[derive(Clone, Copy)]
pub(super) struct Streams {
    pub(super) run: WideFn,
    pub(super) steps: usize,
}

/// A wide kernel and its width in vectors.
#[derive(Clone, Copy)]
pub(super) struct Wide {
    /// For a few steps of k, with others to its right, whose columns it fetches.
    pub(super) run: WideFn,
    /// For many steps of k.
    pub(super) long: WideFn,
    pub(super) vectors: usize,
}

/// Everything compiled for one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Isa {
    pub(super) name: &'static str,
    pub(super) lanes: usize,
    /// Floats between the k-steps of a k-wise panel of A.
    pub(super) col: usize,
    /// `[rows - 1][vectors - 1]`: tiles over row-wise A.
    pub(super) by_row: &'static [[TileFn; 2]],
    /// The same over k-wise A.
    pub(super) by_col: &'static [[TileFn; 2]],
    /// As `by_row`, for f32 B in place.
    pub(super) in_place: &'static [[WideFn; 2]],
    /// `[rows - 1]` for B in place, f32, bf16, f16.
    pub(super) wide: [&'static [Wide]; 3],
    /// `[rows - 1]` for B whose columns are contiguous, f32, bf16, f16.
    pub(super) columns: [&'static [ColumnsFn; COLUMNS_ROWS]; 3],
    /// `[rows - 1]` for B whose rows are contiguous, f32, bf16, f16.
    pub(super) streams: [&'static [Streams; STREAMS_ROWS]; 3],
    pub(super) pack_a: PackA,
    pub(super) pack_b: PackB,
    pub(super) load_tile: LoadTile,
    pub(super) store_tile: StoreTile,
    pub(super) add_bias: AddBias,
    /// The matrix unit for products of many rows, where there is one.
    pub(super) matrix: Option<&'static Matrix>,
}

/// Columns of a panel of B, for vectors of so many lanes.
pub(super) const fn panel_cols(lanes: usize) -> usize {
    2 * lanes
}

/// Where a storage's kernels are listed.
fn place(storage: Storage) -> usize {
    match storage {
        Storage::F32 => 0,
        Storage::Bf16 => 1,
        Storage::F16 => 2,
    }
}

impl Isa {
    /// Rows of the largest tile.
    pub(super) fn mr(&self) -> usize {
        self.by_row.len()
    }
    /// Columns of the largest tile, and of a panel of B.
    pub(super) fn nr(&self) -> usize {
        panel_cols(self.lanes)
    }
    /// The wide kernels for this storage of B.
    pub(super) fn wide(&self, storage: Storage) -> &'static [Wide] {
        self.wide[place(storage)]
    }
    /// The kernel for this storage of B with contiguous rows and this many rows of A.
    pub(super) fn streams(&self, storage: Storage, rows: usize) -> Option<Streams> {
        self.streams[place(storage)].get(rows - 1).copied()
    }
    /// The kernel for this storage of B with contiguous columns and this many rows.
    pub(super) fn columns(&self, storage: Storage, rows: usize) -> Option<ColumnsFn> {
        self.columns[place(storage)].get(rows - 1).copied()
    }
}

/// Instances of every kernel for one [`Simd`], compiled with the given target features: for every number of rows of a
/// tile, `rows x vectors of a wide kernel`.
macro_rules! isa {
    ($(#[$attr:meta])? $name:literal, $simd:ty, [$($mr:literal x $wide:literal),+]) => {
        mod table {
            use super::*;
            use crate::cpu::gemm::ahead::Ahead;
            use crate::cpu::gemm::kernel::{self, ColumnsFn, Isa, ROW, Source, Streams, TileFn, Wide, WideFn};
            use crate::cpu::gemm::{Bias, MatMut, finish, pack};
            use half::{bf16, f16};

            $(#[$attr])?
            unsafe fn tile<const MR: usize, const NV: usize, const RS: usize, const CS: usize>(
                k: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, load: bool, next: &Ahead,
            ) {
                let b_step = kernel::panel_cols(<$simd as kernel::Simd>::LANES);
                // SAFETY: the caller's contract.
                unsafe { kernel::tile::<$simd, f32, MR, NV, RS, CS, 0, true>(k, a, b, b_step, c, ldc, load, next) }
            }
            $(#[$attr])?
            unsafe fn wide<T: Source, const MR: usize, const NV: usize, const AHEAD: usize>(
                k: usize, a: *const f32, b: *const u8, b_step: usize, c: *mut f32, ldc: usize, load: bool,
            ) {
                let next = Ahead::only(c);
                // SAFETY: the caller's contract.
                unsafe { kernel::tile::<$simd, T, MR, NV, ROW, 1, AHEAD, false>(k, a, b.cast(), b_step, c, ldc, load, &next) }
            }
            $(#[$attr])?
            unsafe fn columns<T: Source, const MR: usize>(
                k: usize, a: *const f32, b: *const u8, stride: isize, c: *mut f32, ldc: usize, load: bool,
            ) {
                // SAFETY: the caller's contract.
                unsafe { kernel::columns::<$simd, T, MR>(k, a, b.cast(), stride, c, ldc, load) }
            }
            $(#[$attr])?
            unsafe fn streams<T: Source, const MR: usize, const K: usize>(
                n: usize, a: *const f32, b: *const u8, b_step: usize, c: *mut f32, ldc: usize, load: bool,
            ) {
                // SAFETY: the caller's contract.
                unsafe { kernel::streams::<$simd, T, MR, K>(n, a, b.cast(), b_step, c, ldc, load) }
            }
            const fn all_wide<T: Source, const MR: usize, const NV: usize>() -> Wide {
                Wide { run: wide::<T, MR, NV, { kernel::AHEAD }>, long: wide::<T, MR, NV, 0>, vectors: NV }
            }
            const fn all_streams<T: Source>() -> &'static [Streams; kernel::STREAMS_ROWS] {
                &[
                    Streams { run: streams::<T, 1, 8>, steps: 8 },
                    Streams { run: streams::<T, 2, 8>, steps: 8 },
                    Streams { run: streams::<T, 3, 4>, steps: 4 },
                    Streams { run: streams::<T, 4, 4>, steps: 4 },
                ]
            }
            const fn all_columns<T: Source>() -> &'static [ColumnsFn; kernel::COLUMNS_ROWS] {
                &[
                    columns::<T, 1>, columns::<T, 2>, columns::<T, 3>, columns::<T, 4>,
                    columns::<T, 5>, columns::<T, 6>, columns::<T, 7>, columns::<T, 8>,
                ]
            }
            $(#[$attr])?
            unsafe fn pack_a(args: &pack::ArgsA<'_>, dst: *mut f32) {
                // SAFETY: the caller's contract.
                unsafe { pack::pack_a::<$simd>(args, dst) }
            }
            $(#[$attr])?
            unsafe fn pack_b(args: &pack::ArgsB, dst: *mut f32) {
                // SAFETY: the caller's contract.
                unsafe { pack::pack_b::<$simd>(args, dst) }
            }
            $(#[$attr])?
            unsafe fn load_tile(c: &MatMut, rows: usize, cols: usize, tile: *mut f32, stride: usize) {
                // SAFETY: the caller's contract.
                unsafe { finish::load_tile::<$simd>(c, rows, cols, tile, stride) }
            }
            $(#[$attr])?
            unsafe fn store_tile(c: &MatMut, rows: usize, cols: usize, tile: *const f32, stride: usize) {
                // SAFETY: the caller's contract.
                unsafe { finish::store_tile::<$simd>(c, rows, cols, tile, stride) }
            }
            $(#[$attr])?
            unsafe fn add_bias(tile: *mut f32, stride: usize, spot: finish::Spot, bias: Bias) {
                // SAFETY: the caller's contract.
                unsafe { finish::add_bias::<$simd>(tile, stride, spot, bias) }
            }
            pub(in crate::cpu::gemm) static ISA: Isa = Isa {
                name: $name,
                lanes: <$simd as kernel::Simd>::LANES,
                col: <$simd as kernel::Simd>::COL,
                by_row: &[$([tile::<$mr, 1, ROW, 1> as TileFn, tile::<$mr, 2, ROW, 1>]),+],
                by_col: &[$([
                    tile::<$mr, 1, 1, { <$simd as kernel::Simd>::COL }> as TileFn,
                    tile::<$mr, 2, 1, { <$simd as kernel::Simd>::COL }>,
                ]),+],
                in_place: &[$([wide::<f32, $mr, 1, 0> as WideFn, wide::<f32, $mr, 2, 0>]),+],
                wide: [
                    &[$(all_wide::<f32, $mr, $wide>()),+],
                    &[$(all_wide::<bf16, $mr, $wide>()),+],
                    &[$(all_wide::<f16, $mr, $wide>()),+],
                ],
                columns: [all_columns::<f32>(), all_columns::<bf16>(), all_columns::<f16>()],
                streams: [all_streams::<f32>(), all_streams::<bf16>(), all_streams::<f16>()],
                pack_a,
                pack_b,
                load_tile,
                store_tile,
                add_bias,
                matrix: None,
            };
        }
        pub(super) use table::ISA;
    };
}
pub(super) use isa;

/// Steps of k that are written out in [`tile`]: with eight it was slower than with one.
const UNROLL: usize = 4;

/// Steps of k of a packed B to prefetch ahead: from L2, also where a panel begins.
const PACKED_AHEAD: usize = 16;

/// Bytes of a row of B in place to prefetch ahead.
pub(super) const AHEAD: usize = 512;

/// Bytes of a column of B to prefetch ahead.
const AHEAD_COLUMNS: usize = 256;
/// Most rows of [`streams`]: A must fit in the registers.
pub(super) const STREAMS_ROWS: usize = 4;
/// Most rows of [`columns`]: beyond, packing B pays.
pub(super) const COLUMNS_ROWS: usize = 8;

/// Every instruction set this machine has, best first.
pub(super) fn available() -> impl Iterator<Item = &'static Isa> {
    #[cfg(target_arch = "x86_64")]
    let special = x86::available();
    #[cfg(not(target_arch = "x86_64"))]
    let special = [None; 3];
    special.into_iter().flatten().chain([&super::portable::ISA])
}

#[cfg(target_arch = "x86_64")]
use super::x86;

/// The instruction set asked for, else the best of this machine without a matrix unit; `Err` has the names of all there are. A unit that
/// another thread of the core is busy beside is slower than vectors, and whether one is cannot be known.
pub(super) fn choose(asked: Option<&str>) -> Result<&'static Isa, Vec<&'static str>> {
    let found = available().find(|isa| asked.map_or(isa.matrix.is_none(), |asked| asked == isa.name));
    found.ok_or_else(|| available().map(|isa| isa.name).collect())
}

/// What this process uses, chosen once. Where `MOEBIUS_CPU` asks for what is not there, no device was opened.
pub(super) fn best() -> &'static Isa {
    static BEST: OnceLock<&'static Isa> = OnceLock::new();
    BEST.get_or_init(|| {
        let asked = std::env::var("MOEBIUS_CPU").ok();
        choose(asked.as_deref()).unwrap_or(&super::portable::ISA)
    })
}
