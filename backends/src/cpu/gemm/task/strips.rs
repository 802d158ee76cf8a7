//! Tasks of few rows, in which reading B is the work.

use super::{At, Chunk, Task};
use crate::cpu::gemm::Storage;
use crate::cpu::gemm::ahead::Ahead;
use crate::cpu::gemm::drive::panel_step;
use crate::cpu::gemm::kernel::{ROW, Wide, WideFn};

/// Wide kernels side by side that read B from top to bottom faster than its rows are read one after another.
const NARROW: usize = 2;
/// Steps of k for which a strip task runs over all its columns: streams of B that memory delivers at once.
const STRIP_K: usize = 8;

impl Task<'_, '_> {
    /// Few rows: A is packed whole, and B is read once, from where it lies if a kernel can.
    pub(super) unsafe fn strips(&self) {
        let (rows, b) = (self.rows.1 - self.rows.0, self.problem.b);
        // SAFETY: the caller's contract; `strip_a` floats were set aside for A.
        unsafe {
            for (q, chunk) in self.chunks().enumerate() {
                self.pack_a(self.rows.0, rows, 1, chunk, false, self.a().add(q * rows * ROW));
            }
            if b.col_stride == 1 && b.row_stride >= 0 {
                self.strips_in_place();
            } else {
                self.strips_by_panel();
            }
            self.tell(self.rows);
        }
    }

    /// Whether the block is so narrow that its sums can stay in registers over all steps of k.
    fn is_narrow(&self, rows: usize) -> bool {
        let kernel = self.isa.wide(self.problem.b.storage)[rows - 1].vectors * self.isa.lanes;
        self.cols.1 - self.cols.0 <= NARROW * kernel
    }

    /// The next strip from column `col`: its width, and the wide kernel if there is room for it.
    fn strip(&self, col: usize, rows: usize) -> (usize, Option<WideFn>) {
        let (isa, left) = (self.isa, self.cols.1 - col);
        let Wide { run, long, vectors } = isa.wide(self.problem.b.storage)[rows - 1];
        let run = if self.is_narrow(rows) { long } else { run };
        // Whole vectors first, so that what does not fit C is the same columns whichever kernels run.
        match left / isa.lanes {
            0 => (left, None),
            1 => (isa.lanes, None),
            full if full < vectors => (isa.nr(), None),
            _ => (vectors * isa.lanes, Some(run)),
        }
    }

    /// All columns for a few steps of k, then the next few: B is read along its rows, which are longer than a page,
    /// and the sums wait in L1. A narrow block is read from top to bottom, wide kernel by wide kernel.
    unsafe fn strips_in_place(&self) {
        let (isa, b) = (self.isa, self.problem.b);
        let (row, rows) = (self.rows.0, self.rows.1 - self.rows.0);
        let width = (self.cols.1 - self.cols.0).next_multiple_of(isa.nr());
        let ldb = b.row_stride as usize;
        let whole = (self.cols.1 - self.cols.0) / isa.lanes * isa.lanes;
        let (streams, most) =
            if self.is_narrow(rows) { (None, usize::MAX) } else { (isa.streams(b.storage, rows), STRIP_K) };
        let sums_at = |col: usize, cols: usize| {
            let at = At { row, rows, col, cols };
            (at, self.place(at, (self.sums().wrapping_add(col - self.cols.0), width), self.fits_c(cols)))
        };
        // SAFETY: the caller's contract; the scratch has room for the sums.
        unsafe {
            let mut col = self.cols.0;
            while self.gemm.accumulate && col < self.cols.1 {
                let (cols, _) = self.strip(col, rows);
                let (at, sums) = sums_at(col, cols);
                if !sums.in_c {
                    (isa.load_tile)(&self.c(at), rows, cols, sums.at, sums.stride);
                }
                col += cols;
            }
            for (q, chunk) in self.chunks().enumerate() {
                let mut done = 0;
                loop {
                    let streams = streams.filter(|streams| done + streams.steps <= chunk.len && whole > 0);
                    let len = streams.map_or(most.min(chunk.len - done), |streams| streams.steps);
                    let part = Chunk { k: chunk.k + done, len, first: chunk.first && done == 0, last: false };
                    let a = self.a().add(q * rows * ROW + done);
                    let load = !part.first || self.gemm.accumulate;
                    let mut col = self.cols.0;
                    if let Some(streams) = streams {
                        let (_, sums) = sums_at(col, whole);
                        let from = b.from(part.k as isize, col as isize).data;
                        (streams.run)(whole, a, from, ldb, sums.at, sums.stride, load);
                        col += whole;
                    }
                    while col < self.cols.1 {
                        let (cols, wide) = self.strip(col, rows);
                        let (_, sums) = sums_at(col, cols);
                        let from = b.from(part.k as isize, col as isize).data;
                        if let Some(wide) = wide {
                            wide(len, a, from, ldb, sums.at, sums.stride, load);
                        } else {
                            let vectors = cols.div_ceil(isa.lanes);
                            if b.storage == Storage::F32 && cols.is_multiple_of(isa.lanes) {
                                let kernel = isa.in_place[rows - 1][vectors - 1];
                                kernel(len, a, from, ldb, sums.at, sums.stride, load);
                            } else {
                                self.pack_b(part, (col, cols), panel_step(isa, part.len) * size_of::<f32>());
                                let kernel = isa.by_row[rows - 1][vectors - 1];
                                kernel(len, a, self.b(), sums.at, sums.stride, load, &Ahead::only(sums.at));
                            }
                        }
                        col += cols;
                    }
                    done += len;
                    if done == chunk.len {
                        break;
                    }
                }
            }
            let mut col = self.cols.0;
            while col < self.cols.1 {
                let (cols, _) = self.strip(col, rows);
                let (at, sums) = sums_at(col, cols);
                self.finish(at, &sums);
                col += cols;
            }
        }
    }

    /// Vector after vector of columns transposed in registers, or panel after panel packed.
    unsafe fn strips_by_panel(&self) {
        let (isa, b) = (self.isa, self.problem.b);
        let (row, rows) = (self.rows.0, self.rows.1 - self.rows.0);
        let columns = isa.columns(b.storage, rows).filter(|_| b.row_stride == 1);
        let mut col = self.cols.0;
        // SAFETY: the caller's contract.
        unsafe {
            while col < self.cols.1 {
                let left = self.cols.1 - col;
                let columns = columns.filter(|_| isa.lanes <= left);
                let cols = if columns.is_some() { isa.lanes } else { left.min(isa.nr()) };
                let at = At { row, rows, col, cols };
                let sums = self.place(at, (self.tile(), isa.nr()), self.fits_c(cols));
                if !sums.in_c && self.gemm.accumulate {
                    (isa.load_tile)(&self.c(at), rows, cols, sums.at, sums.stride);
                }
                for (q, chunk) in self.chunks().enumerate() {
                    let load = !chunk.first || self.gemm.accumulate;
                    let a = self.a().add(q * rows * ROW);
                    if let Some(columns) = columns {
                        let from = b.from(chunk.k as isize, col as isize).data;
                        columns(chunk.len, a, from, b.col_stride, sums.at, sums.stride, load);
                    } else {
                        self.pack_b(chunk, (col, cols), panel_step(isa, chunk.len) * size_of::<f32>());
                        let kernel = isa.by_row[rows - 1][cols.div_ceil(isa.lanes) - 1];
                        kernel(chunk.len, a, self.b(), sums.at, sums.stride, load, &Ahead::only(sums.at));
                    }
                }
                self.finish(at, &sums);
                col += cols;
            }
        }
    }
}
