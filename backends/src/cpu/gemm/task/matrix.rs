//! Blocks of C on a matrix unit.

use super::{At, Packed, Sums, Task};
use crate::cpu::gemm::drive::sums_aside;
use crate::cpu::gemm::matrix::{Block, Matrix, SIDE, STEP, panel_bytes, parts, products};
use crate::cpu::gemm::pack::place;
use crate::cpu::gemm::problem::Problem;
use crate::cpu::gemm::{Mat, Storage};

impl Task<'_, '_> {
    /// A block of B is split once and used by all rows, [`SIDE`] of which are split at a time.
    pub(super) unsafe fn matrix(&self, unit: &Matrix, packed: &mut Packed) {
        let (isa, problem) = (self.isa, &self.problem);
        let (first_col, last_col) = self.cols;
        let width = (last_col - first_col).next_multiple_of(SIDE);
        let (a, b) = (problem.a.storage, problem.b.storage);
        let keep = sums_aside(problem.c.storage, problem.k);
        // SAFETY: the caller's contract; the scratch has room for the block (`Scratch::new`).
        unsafe {
            for (q, chunk) in self.chunks().enumerate() {
                let (block, panel_bytes) = self.block_of_b(q, chunk, panel_bytes(chunk.len, parts(b)), packed);
                for row in (self.rows.0..self.rows.1).step_by(SIDE) {
                    let rows = SIDE.min(self.rows.1 - row);
                    (unit.split_a)(&self.rows_of_a(row, rows, 1, chunk, false), self.scratch);
                    for (panel, col) in (first_col..last_col).step_by(SIDE).enumerate() {
                        let cols = SIDE.min(last_col - col);
                        let at = At { row, rows, col, cols };
                        let aside = if keep {
                            (self.sums().add((row - self.rows.0) * width + panel * SIDE), width)
                        } else {
                            (self.tile(), SIDE)
                        };
                        let sums = self.place(at, aside, self.fits_c(cols));
                        if !sums.in_c && !chunk.first && !keep {
                            (isa.load_tile)(&self.c(at), rows, cols, sums.at, sums.stride);
                        }
                        (unit.block)(&Block {
                            products: products(a, b),
                            parts: [parts(a), parts(b)],
                            steps: chunk.len.div_ceil(STEP),
                            a: self.scratch,
                            b: block.add(panel * panel_bytes),
                            c: sums.at,
                            ldc: sums.stride,
                            rows,
                            cols: cols.next_multiple_of(isa.lanes),
                            load: !chunk.first,
                        });
                        if chunk.last {
                            if (unit.any_not_finite)(sums.at, sums.stride, rows, cols) {
                                self.sum_again(at, &sums);
                            }
                            self.finish(at, &sums);
                        } else if !sums.in_c && !keep {
                            // C is f32 here, so that it holds the sums of the blocks so far exactly.
                            (isa.store_tile)(&self.c(at), rows, cols, sums.at, sums.stride);
                        }
                    }
                    if chunk.last {
                        self.tell((row, row + rows));
                    }
                }
            }
            (unit.release)();
        }
    }

    /// Sums that are not finite, once more, as chains of multiply-adds: parts of an infinite number are NaN, and so is what
    /// they are multiplied by.
    unsafe fn sum_again(&self, at: At, sums: &Sums) {
        let Problem { a, b, row_list, k_list, k, .. } = self.problem;
        // SAFETY: the caller's contract; the tile covers `at`.
        unsafe {
            let of_a = |i: usize, p: usize| match (place(row_list, at.row + i), place(k_list, p)) {
                (Some(row), Some(p)) => element(a, row, p),
                _ => 0.0,
            };
            // NaN in a row or a column is NaN in all its sums, and then often in all rows and columns.
            let rows = (0..at.rows).filter(|&i| !(0..k).any(|p| of_a(i, p).is_nan()));
            for i in rows {
                for j in 0..at.cols {
                    let sum = &mut *sums.at.add(i * sums.stride + j);
                    if !sum.is_finite() {
                        *sum = (0..k)
                            .fold(0.0, |sum, p| of_a(i, p).mul_add(element(b, p as isize, (at.col + j) as isize), sum));
                    }
                }
            }
        }
    }
}

/// Element `(i, j)`.
unsafe fn element(mat: Mat, i: isize, j: isize) -> f32 {
    let data = mat.from(i, j).data;
    // SAFETY: the caller's element exists.
    unsafe {
        match mat.storage {
            Storage::F32 => data.cast::<f32>().read(),
            Storage::Bf16 => data.cast::<half::bf16>().read().to_f32(),
            Storage::F16 => data.cast::<half::f16>().read().to_f32(),
        }
    }
}
