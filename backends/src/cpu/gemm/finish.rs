//! Between a tile of f32 sums and C: the sums it starts from, bias, and the one rounding.

use half::{bf16, f16};

use super::kernel::{Simd, Source};
use super::{Bias, MatMut, Storage};

pub(super) type LoadTile = unsafe fn(&MatMut, usize, usize, *mut f32, usize);
pub(super) type StoreTile = unsafe fn(&MatMut, usize, usize, *const f32, usize);
pub(super) type AddBias = unsafe fn(*mut f32, usize, Spot, Bias);

/// Reads `rows x cols` values of C into a tile whose rows are `stride` floats apart.
///
/// # Safety
/// Both cover the tile.
#[inline(always)]
pub(super) unsafe fn load_tile<S: Simd>(c: &MatMut, rows: usize, cols: usize, tile: *mut f32, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        match c.storage {
            Storage::F32 => load_of::<S, f32>(c, rows, cols, tile, stride),
            Storage::Bf16 => load_of::<S, bf16>(c, rows, cols, tile, stride),
            Storage::F16 => load_of::<S, f16>(c, rows, cols, tile, stride),
        }
    }
}

#[inline(always)]
unsafe fn load_of<S: Simd, T: Source>(c: &MatMut, rows: usize, cols: usize, tile: *mut f32, stride: usize) {
    for i in 0..rows {
        // SAFETY: the caller's contract.
        unsafe {
            let from = c.data.cast::<T>().offset(i as isize * c.row_stride);
            let to = tile.add(i * stride);
            for j in 0..cols {
                *to.add(j) = (*from.offset(j as isize * c.col_stride)).to_f32();
            }
        }
    }
}

/// Rounds a tile into `rows x cols` values of C.
///
/// # Safety
/// Both cover the tile.
#[inline(always)]
pub(super) unsafe fn store_tile<S: Simd>(c: &MatMut, rows: usize, cols: usize, tile: *const f32, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        match c.storage {
            Storage::F32 => store_of::<S, f32>(c, rows, cols, tile, stride),
            Storage::Bf16 => store_of::<S, bf16>(c, rows, cols, tile, stride),
            Storage::F16 => store_of::<S, f16>(c, rows, cols, tile, stride),
        }
    }
}

#[inline(always)]
unsafe fn store_of<S: Simd, T: Source>(c: &MatMut, rows: usize, cols: usize, tile: *const f32, stride: usize) {
    for i in 0..rows {
        // SAFETY: the caller's contract.
        unsafe {
            let from = tile.add(i * stride);
            let to = c.data.cast::<T>().offset(i as isize * c.row_stride);
            let mut j = 0;
            if c.col_stride == 1 {
                while j + S::LANES <= cols {
                    T::store::<S>(to.add(j), S::load(from.add(j)));
                    j += S::LANES;
                }
            }
            while j < cols {
                *to.offset(j as isize * c.col_stride) = T::from_f32(*from.add(j));
                j += 1;
            }
        }
    }
}

/// Where a tile lies.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    pub(super) problem: usize,
    /// First column of C.
    pub(super) col: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// Adds the bias to finished sums.
///
/// # Safety
/// The tile covers `spot`, and the bias the problem's N values.
#[inline(always)]
pub(super) unsafe fn add_bias<S: Simd>(tile: *mut f32, stride: usize, spot: Spot, bias: Bias) {
    // SAFETY: the caller's contract.
    unsafe {
        match bias.storage {
            Storage::F32 => add_bias_of::<S, f32>(tile, stride, spot, bias),
            Storage::Bf16 => add_bias_of::<S, bf16>(tile, stride, spot, bias),
            Storage::F16 => add_bias_of::<S, f16>(tile, stride, spot, bias),
        }
    }
}

#[inline(always)]
unsafe fn add_bias_of<S: Simd, T: Source>(tile: *mut f32, stride: usize, spot: Spot, bias: Bias) {
    // SAFETY: the caller's contract.
    unsafe {
        let from = bias.data.cast::<T>().offset(spot.problem as isize * bias.step).add(spot.col);
        let mut j = 0;
        while j + S::LANES <= spot.cols {
            let bias = T::load::<S>(from.add(j));
            for i in 0..spot.rows {
                let to = tile.add(i * stride + j);
                S::store(to, S::add(S::load(to), bias));
            }
            j += S::LANES;
        }
        for i in 0..spot.rows {
            for j in j..spot.cols {
                *tile.add(i * stride + j) += (*from.add(j)).to_f32();
            }
        }
    }
}
