//! One task: a block of C of one problem, computed by one thread.

mod matrix;
mod strips;

use super::ahead::{Ahead, Region};
use super::drive::{Scratch, chunks, group_tiles, pack_panels, panel_step, sums_aside, tile_step, whole_panel};
use super::finish::Spot;
use super::kernel::{Isa, MAX_TILE};
use super::matrix::Matrix;
use super::pack::{ArgsA, edge};
use super::problem::{self, Problem};
use super::{Gemm, MatMut, Part, Storage};

/// A block of C: `rows` and `cols` (from, to) of one problem.
pub(super) struct Task<'t, 'a> {
    pub(super) isa: &'static Isa,
    /// The matrix unit, if the task runs on it.
    pub(super) unit: Option<&'static Matrix>,
    pub(super) gemm: &'t Gemm<'a>,
    pub(super) layout: &'t Scratch,
    /// This thread's part of the workspace.
    pub(super) scratch: *mut u8,
    pub(super) problem: Problem<'a>,
    /// Few enough rows to run as a strip.
    pub(super) strip: bool,
    /// All of B packed, as [`super::drive`] does; else blocks of it are packed here.
    pub(super) whole: Option<*const u8>,
    pub(super) rows: (usize, usize),
    pub(super) cols: (usize, usize),
}

/// Which block of B a thread's scratch holds: problem and first column.
pub(super) type Packed = Option<(usize, usize)>;

/// A tile's rows and columns within the problem.
#[derive(Clone, Copy)]
struct At {
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}

/// Where the sums of a tile are kept while the kernel runs.
struct Sums {
    at: *mut f32,
    stride: usize,
    /// In C itself; else beside it.
    in_c: bool,
}

/// One block of k: its first step, its length, and whether it is the first and the last.
#[derive(Clone, Copy)]
struct Chunk {
    k: usize,
    len: usize,
    first: bool,
    last: bool,
}

impl Task<'_, '_> {
    /// Computes the block.
    ///
    /// # Safety
    /// [`super::gemm`]'s contract, and nobody else uses the scratch or writes the block.
    pub(super) unsafe fn run(&self, packed: &mut Packed) {
        // SAFETY: the caller's contract.
        unsafe {
            if self.strip {
                *packed = None;
                self.strips();
            } else if let Some(unit) = self.unit.filter(|_| self.problem.k > 0) {
                self.matrix(unit, packed);
            } else {
                self.block(packed);
            }
        }
    }

    fn a(&self) -> *mut f32 {
        self.scratch.cast()
    }
    fn b(&self) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.b).cast()
    }
    fn tile(&self) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.tile).cast()
    }
    fn stage(&self) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.stage).cast()
    }
    fn sums(&self) -> *mut f32 {
        self.scratch.wrapping_add(self.layout.sums).cast()
    }

    fn chunks(&self) -> impl Iterator<Item = Chunk> + use<> {
        let all = self.problem.k;
        let (count, step) = chunks(all);
        (0..count).map(move |i| Chunk {
            k: i * step,
            len: step.min(all - i * step),
            first: i == 0,
            last: i + 1 == count,
        })
    }

    /// How many groups of tiles the block's rows make.
    fn groups(&self) -> usize {
        let rows = self.rows.1 - self.rows.0;
        rows.div_ceil(group_tiles(self.isa, rows) * self.isa.mr())
    }

    /// The first row (within the problem) and the height of a group; they are as even as can be.
    fn group(&self, i: usize) -> (usize, usize) {
        let (rows, count) = (self.rows.1 - self.rows.0, self.groups());
        (self.rows.0 + edge(rows, count, i), edge(rows, count, i + 1) - edge(rows, count, i))
    }

    /// The chunk after this one; after the last one the first, which the block below it, if there is one, begins with.
    fn chunk_after(&self, chunk: Chunk) -> Option<Chunk> {
        let below = self.rows.1 < problem::size(self.gemm, self.problem.index).0;
        self.chunks().find(|next| next.k == chunk.k + chunk.len).or_else(|| self.chunks().next().filter(|_| below))
    }

    /// What of A is packed after group `i` of a chunk.
    fn a_after(&self, i: usize, chunk: Chunk) -> Region {
        let Problem { a, row_list: None, k_list: None, .. } = self.problem else { return Region::NONE };
        let (row, height, chunk) = match (i + 1 < self.groups(), self.chunk_after(chunk)) {
            (true, _) => {
                let (row, height) = self.group(i + 1);
                (row, height, chunk)
            }
            (false, None) => return Region::NONE,
            (false, Some(next)) => {
                let (row, height) = self.group(0);
                (if next.k > chunk.k { row } else { self.rows.1 }, height, next)
            }
        };
        Region::of(a.from(row as isize, chunk.k as isize), height, chunk.len)
    }

    /// What of B is packed after the block of a chunk.
    fn b_after(&self, chunk: Chunk) -> Region {
        match self.chunk_after(chunk) {
            Some(next) if self.whole.is_none() && next.k != chunk.k => {
                let b = self.problem.b.from(next.k as isize, self.cols.0 as isize);
                Region::of(b, next.len, self.cols.1 - self.cols.0)
            }
            Some(_) | None => Region::NONE,
        }
    }

    /// Rows of A for one chunk, shared out among tiles.
    fn rows_of_a(&self, row: usize, rows: usize, tiles: usize, chunk: Chunk, by_col: bool) -> ArgsA<'_> {
        let Problem { a, row_list, k_list, .. } = self.problem;
        let i = if row_list.is_none() { row as isize } else { 0 };
        let p = if k_list.is_none() { chunk.k as isize } else { 0 };
        ArgsA {
            a: a.from(i, p),
            rows,
            tiles,
            tile_step: tile_step(self.isa),
            k: chunk.len,
            row_list: row_list.map(|list| &list[row..row + rows]),
            k_list: k_list.map(|list| &list[chunk.k..chunk.k + chunk.len]),
            by_col,
        }
    }

    /// Packs rows of A for one chunk, shared out among tiles.
    unsafe fn pack_a(&self, row: usize, rows: usize, tiles: usize, chunk: Chunk, by_col: bool, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { (self.isa.pack_a)(&self.rows_of_a(row, rows, tiles, chunk, by_col), to) }
    }

    /// Packs columns of B for one chunk, into panels so many bytes apart.
    unsafe fn pack_b(&self, chunk: Chunk, (col, cols): (usize, usize), panel: usize) {
        let b = self.problem.b.from(chunk.k as isize, col as isize);
        // SAFETY: the caller's contract.
        unsafe { pack_panels(self.isa, self.unit, b, [chunk.len, cols], panel, self.stage(), self.b().cast()) }
    }

    /// The block of B for one chunk, packed, and the bytes from panel to panel.
    unsafe fn block_of_b(&self, q: usize, chunk: Chunk, panel: usize, packed: &mut Packed) -> (*const u8, usize) {
        let nr = self.isa.nr();
        if let Some(whole) = self.whole {
            let panel = whole_panel(self.isa, self.unit, self.gemm);
            return (whole.wrapping_add((q * self.gemm.n.div_ceil(nr) + self.cols.0 / nr) * panel), panel);
        }
        // Blocks of the same columns come one after another, so a B of one chunk often is there already.
        let this = (self.problem.index, self.cols.0);
        if *packed != Some(this) {
            // SAFETY: the caller's contract.
            unsafe { self.pack_b(chunk, (self.cols.0, self.cols.1 - self.cols.0), panel) };
        }
        *packed = (chunk.first && chunk.last).then_some(this);
        (self.b().cast_const().cast(), panel)
    }

    fn c(&self, at: At) -> MatMut {
        self.problem.c.from(at.row as isize, at.col as isize)
    }

    /// The kernel can write whole vectors of this tile into C.
    fn fits_c(&self, cols: usize) -> bool {
        let c = &self.problem.c;
        c.storage == Storage::F32 && c.col_stride == 1 && c.row_stride >= 0 && cols.is_multiple_of(self.isa.lanes)
    }

    /// Where a tile's sums are kept: `in_c`, or aside, where there is memory for the tile with this row stride.
    fn place(&self, at: At, aside: (*mut f32, usize), in_c: bool) -> Sums {
        if in_c {
            Sums { at: self.c(at).data.cast(), stride: self.problem.c.row_stride as usize, in_c: true }
        } else {
            Sums { at: aside.0, stride: aside.1, in_c: false }
        }
    }

    /// Where C's tile after `at` begins, to the right or from row `below` on; that of `at` if it is the block's last.
    fn after(&self, below: usize, at: At) -> *mut u8 {
        let right = at.col + at.cols;
        let (row, col) = match right < self.cols.1 {
            true => (at.row, right),
            false if below < self.rows.1 => (below, self.cols.0),
            false => (at.row, at.col),
        };
        self.problem.c.from(row as isize, col as isize).data
    }

    /// Bias and the store of a tile whose sums are complete.
    unsafe fn finish(&self, at: At, sums: &Sums) {
        let Problem { index, unused, .. } = self.problem;
        // SAFETY: the caller's contract.
        unsafe {
            if let Some(bias) = self.gemm.bias.filter(|_| !unused) {
                let spot = Spot { problem: index, col: at.col, rows: at.rows, cols: at.cols };
                (self.isa.add_bias)(sums.at, sums.stride, spot, bias);
            }
            if !sums.in_c {
                (self.isa.store_tile)(&self.c(at), at.rows, at.cols, sums.at, sums.stride);
            }
        }
    }

    /// All columns of some rows (from, to) of the block are stored.
    fn tell(&self, (from, to): (usize, usize)) {
        if let Some(finished) = self.gemm.finished {
            let Problem { index, first_row, .. } = self.problem;
            let (rows, cols) = (first_row + from..first_row + to, self.cols.0..self.cols.1);
            finished(Part { problem: index, rows, cols });
        }
    }

    /// Many rows: a block of B is packed once and used by every tile of rows.
    unsafe fn block(&self, packed: &mut Packed) {
        let (isa, problem) = (self.isa, &self.problem);
        let (nr, (first_col, last_col)) = (isa.nr(), self.cols);
        let by_col = problem.a.row_stride == 1 && problem.a.col_stride != 1 && problem.row_list.is_none();
        let kernels = if by_col { isa.by_col } else { isa.by_row };
        let width = (last_col - first_col).next_multiple_of(nr);
        let keep = sums_aside(problem.c.storage, problem.k);
        let kernel = |rows: usize, cols: usize| kernels[rows - 1][cols.div_ceil(isa.lanes) - 1];
        // Found once: what follows is done for each tile, and divisions take long.
        let full_in_c = self.fits_c(nr);
        // SAFETY: the caller's contract; the scratch has room for the block (`Scratch::new`).
        unsafe {
            for (q, chunk) in self.chunks().enumerate() {
                let panel = panel_step(isa, chunk.len) * size_of::<f32>();
                let (block, panel_bytes) = self.block_of_b(q, chunk, panel, packed);
                let mut b_after = self.b_after(chunk);
                for i in 0..self.groups() {
                    let (group, height) = self.group(i);
                    let mut a_after = self.a_after(i, chunk);
                    let tiles = height.div_ceil(isa.mr());
                    self.pack_a(group, height, tiles, chunk, by_col, self.a());
                    for tile in 0..tiles {
                        let (top, end) = (edge(height, tiles, tile), edge(height, tiles, tile + 1));
                        let (row, rows) = (group + top, end - top);
                        let a = self.a().add(tile * tile_step(isa));
                        let full_kernel = kernel(rows, nr);
                        for (panel, col) in (first_col..last_col).step_by(nr).enumerate() {
                            let cols = nr.min(last_col - col);
                            let at = At { row, rows, col, cols };
                            let (kernel, in_c) = match cols == nr {
                                true => (full_kernel, full_in_c),
                                false => (kernel(rows, cols), self.fits_c(cols)),
                            };
                            let aside = if keep {
                                (self.sums().add((row - self.rows.0) * width + panel * nr), width)
                            } else {
                                (self.tile(), nr)
                            };
                            let sums = self.place(at, aside, in_c);
                            let load = !chunk.first || self.gemm.accumulate;
                            if !sums.in_c && load && (chunk.first || !keep) {
                                (isa.load_tile)(&self.c(at), rows, cols, sums.at, sums.stride);
                            }
                            let b = block.add(panel * panel_bytes).cast();
                            let next = match sums.in_c && chunk.first {
                                true => self.after(row + rows, at).cast_const().cast(),
                                false => sums.at,
                            };
                            let next = Ahead { c: next, a: a_after.next(a), b: b_after.next(a) };
                            kernel(chunk.len, a, b, sums.at, sums.stride, load, &next);
                            if chunk.last {
                                self.finish(at, &sums);
                            } else if !sums.in_c && !keep {
                                // C is f32 here, so that it holds the sums of the blocks so far exactly.
                                (isa.store_tile)(&self.c(at), rows, cols, sums.at, sums.stride);
                            }
                        }
                    }
                    if chunk.last {
                        self.tell((group, group + height));
                    }
                }
            }
        }
    }
}

const _: () = assert!(MAX_TILE >= 14 * 32, "a tile must hold what the largest kernel writes");
