//! Operands become the bf16 parts of their elements, in the tiles that the matrix unit reads.
//!
//! A tile's 32 bits are a pair of steps of k, p and p + TILE: two vectors of f32 are joined without moving a lane.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{MAX_PARTS, PART_BYTES, SIDE, STEP, SplitB, TILE, TILE_BYTES, parts};
use crate::cpu::gemm::Storage;
use crate::cpu::gemm::kernel::{Simd, Source};
use crate::cpu::gemm::pack::{ArgsA, place};
use crate::cpu::gemm::x86::Avx512;

/// Rows of A and B to prefetch ahead.
const ROWS_AHEAD: isize = 6;

/// The parts of two vectors, pair by pair, largest first; the lower half of each 32 bits is of `first`.
#[inline(always)]
unsafe fn split<const PARTS: usize>(first: __m512, second: __m512) -> [__m512i; MAX_PARTS] {
    // SAFETY: called only from functions compiled for AVX-512.
    unsafe {
        let (upper, half) = (_mm512_set1_epi32(!0xffff), _mm512_set1_epi32(0x8000));
        let mut pairs = [_mm512_setzero_si512(); MAX_PARTS];
        let mut rest = [first, second];
        for (part, pair) in pairs.iter_mut().enumerate().take(PARTS) {
            let bits = rest.map(|rest| {
                let bits = _mm512_castps_si512(rest);
                // The last part is exact, and so is a bf16.
                if part + 1 < PARTS { _mm512_add_epi32(bits, half) } else { bits }
            });
            if part + 1 < PARTS {
                for (rest, bits) in rest.iter_mut().zip(bits) {
                    *rest = _mm512_sub_ps(*rest, _mm512_castsi512_ps(_mm512_and_si512(bits, upper)));
                }
            }
            // (first >> 16) | (second & upper)
            let low = _mm512_srli_epi32::<16>(bits[0]);
            *pair = _mm512_ternarylogic_epi32::<0xf8>(low, bits[1], upper);
        }
        pairs
    }
}

/// Stores what [`split`] made of two vectors, each part at its place of a step.
#[inline(always)]
unsafe fn put<const PARTS: usize>(first: __m512, second: __m512, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe {
        let pairs = split::<PARTS>(first, second);
        for (part, &pair) in pairs.iter().enumerate().take(PARTS) {
            _mm512_store_si512(to.add(part * PART_BYTES).cast(), pair);
        }
    }
}

/// Splits at most SIDE rows of A, as [`super::Matrix::split_a`] says.
///
/// # Safety
/// The processor has AVX-512; the source covers the rows; `dst`, at a multiple of 64 bytes, has room for their parts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn split_a(args: &ArgsA<'_>, dst: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe {
        match args.a.storage {
            Storage::F32 => split_a_of::<f32, { parts(Storage::F32) }>(args, dst),
            Storage::Bf16 => split_a_of::<bf16, { parts(Storage::Bf16) }>(args, dst),
            Storage::F16 => split_a_of::<f16, { parts(Storage::F16) }>(args, dst),
        }
    }
}

#[inline(always)]
unsafe fn split_a_of<T: Source, const PARTS: usize>(args: &ArgsA<'_>, dst: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe {
        if args.a.row_stride == 1 && args.a.col_stride != 1 && args.row_list.is_none() {
            for strip in 0..args.rows.div_ceil(TILE) {
                let rows = TILE.min(args.rows - strip * TILE);
                split_across::<T, PARTS>(args, strip * TILE, rows, dst.add(strip * TILE_BYTES));
            }
            return;
        }
        for i in 0..args.rows {
            split_row::<T, PARTS>(args, i, dst.add(i / TILE * TILE_BYTES + i % TILE * 64));
        }
    }
}

/// Row `i` of A; `to` is its place in the first step's first part.
#[inline(always)]
unsafe fn split_row<T: Source, const PARTS: usize>(args: &ArgsA<'_>, i: usize, to: *mut u8) {
    let step_bytes = PARTS * PART_BYTES;
    // SAFETY: the caller's contract.
    unsafe {
        let Some(row) = place(args.row_list, i) else {
            for step in 0..args.k.div_ceil(STEP) {
                put::<PARTS>(Avx512::zero(), Avx512::zero(), to.add(step * step_bytes));
            }
            return;
        };
        let from = args.a.data.cast::<T>().offset(row * args.a.row_stride);
        let whole = if args.a.col_stride == 1 && args.k_list.is_none() { args.k / STEP } else { 0 };
        if args.row_list.is_none() {
            // A row is a short run of memory, after which the hardware would have to learn the next one.
            let ahead = from.wrapping_offset(ROWS_AHEAD * args.a.row_stride).cast::<u8>();
            for byte in (0..whole * STEP * size_of::<T>()).step_by(64) {
                Avx512::prefetch(ahead.wrapping_add(byte));
            }
        }
        for step in 0..whole {
            let from = from.add(step * STEP);
            put::<PARTS>(T::load::<Avx512>(from), T::load::<Avx512>(from.add(TILE)), to.add(step * step_bytes));
        }
        for step in whole..args.k.div_ceil(STEP) {
            let mut values = [0.0f32; STEP];
            for (p, value) in (step * STEP..args.k).zip(&mut values) {
                *value = place(args.k_list, p).map_or(0.0, |at| (*from.offset(at * args.a.col_stride)).to_f32());
            }
            let (first, second) = (Avx512::load(values.as_ptr()), Avx512::load(values.as_ptr().add(TILE)));
            put::<PARTS>(first, second, to.add(step * step_bytes));
        }
    }
}

/// `rows` rows of an A whose columns are contiguous, from row `top` on: transposed in registers.
#[inline(always)]
unsafe fn split_across<T: Source, const PARTS: usize>(args: &ArgsA<'_>, top: usize, rows: usize, to: *mut u8) {
    let src = args.a.data.cast::<T>().wrapping_add(top);
    // SAFETY: the caller's contract.
    unsafe {
        let column = |p: usize| {
            let Some(at) = (p < args.k).then(|| place(args.k_list, p)).flatten() else { return Avx512::zero() };
            let from = src.offset(at * args.a.col_stride);
            if rows == TILE {
                return T::load::<Avx512>(from);
            }
            let mut values = [0.0f32; TILE];
            Avx512::copy_few(from, rows, values.as_mut_ptr());
            Avx512::load(values.as_ptr())
        };
        for step in 0..args.k.div_ceil(STEP) {
            let (mut first, mut second) = ([Avx512::zero(); TILE], [Avx512::zero(); TILE]);
            for q in 0..TILE {
                first[q] = column(step * STEP + q);
                second[q] = column(step * STEP + TILE + q);
                if args.k_list.is_none() {
                    for q in [q, q + TILE] {
                        let ahead = ((step + 1) * STEP + q) as isize * args.a.col_stride;
                        Avx512::prefetch(src.wrapping_offset(ahead).cast());
                    }
                }
            }
            Avx512::transpose(&mut first);
            Avx512::transpose(&mut second);
            for i in 0..rows {
                put::<PARTS>(first[i], second[i], to.add(step * PARTS * PART_BYTES + i * 64));
            }
        }
    }
}

/// Splits columns of B, as [`super::Matrix::split_b`] says.
///
/// # Safety
/// The processor has AVX-512; the source covers the block; `dst`, at a multiple of 64 bytes, has room for its parts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn split_b(args: &SplitB, dst: *mut u8) {
    // SAFETY: the caller's contract. Panels hold the values of the storage in f32.
    unsafe {
        match (args.b.storage, args.in_place) {
            (Storage::F32, true) => split_b_of::<f32, { parts(Storage::F32) }>(args, dst),
            (Storage::Bf16, true) => split_b_of::<bf16, { parts(Storage::Bf16) }>(args, dst),
            (Storage::F16, true) => split_b_of::<f16, { parts(Storage::F16) }>(args, dst),
            (Storage::F32, false) => split_b_of::<f32, { parts(Storage::F32) }>(args, dst),
            (Storage::Bf16, false) => split_b_of::<f32, { parts(Storage::Bf16) }>(args, dst),
            (Storage::F16, false) => split_b_of::<f32, { parts(Storage::F16) }>(args, dst),
        }
    }
}

#[inline(always)]
unsafe fn split_b_of<T: Source, const PARTS: usize>(args: &SplitB, dst: *mut u8) {
    let (src, stride) = (args.b.data.cast::<T>(), args.b.row_stride);
    // SAFETY: the caller's contract.
    unsafe {
        for step in 0..args.k.div_ceil(STEP) {
            for q in 0..TILE {
                let (first, second) = (step * STEP + q, step * STEP + TILE + q);
                let row = |p: usize, col: usize| match p < args.k {
                    true => T::load::<Avx512>(src.offset(p as isize * stride).add(col)),
                    false => Avx512::zero(),
                };
                // Along the rows of B, over all panels: whole rows are what memory delivers fastest.
                for panel in 0..args.n / SIDE {
                    let to = dst.add(panel * args.panel_bytes + step * PARTS * PART_BYTES + q * 64);
                    for tile in 0..SIDE / TILE {
                        let col = panel * SIDE + tile * TILE;
                        if args.in_place {
                            for p in [first, second] {
                                let ahead = src.wrapping_offset((p as isize + ROWS_AHEAD) * stride).wrapping_add(col);
                                Avx512::prefetch(ahead.cast());
                            }
                        }
                        put::<PARTS>(row(first, col), row(second, col), to.add(tile * TILE_BYTES));
                    }
                }
            }
        }
    }
}

/// Whether one of `rows x cols` floats is infinite or NaN.
///
/// # Safety
/// The processor has AVX-512; `from` covers them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn any_not_finite(from: *const f32, stride: usize, rows: usize, cols: usize) -> bool {
    // SAFETY: the caller's contract.
    unsafe {
        let mut most = _mm512_setzero_si512();
        for i in 0..rows {
            for j in (0..cols).step_by(TILE) {
                let mask = if cols - j >= TILE { !0 } else { (1u16 << (cols - j)) - 1 };
                let bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, from.add(i * stride + j)));
                most = _mm512_max_epu32(most, _mm512_add_epi32(bits, bits));
            }
        }
        // All ones in the exponent, whatever the sign.
        _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(0xff00_0000u32 as i32)) != 0
    }
}
