//! What comes next into L2 while a tile is computed: the rows of A that are packed next, the block of B after this one.
//!
//! Packing copies at the pace at which memory delivers. While tiles are computed memory has nothing to do; so each tile's
//! kernel asks for some cache lines of what is packed after it.

use super::Mat;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Steps of k between two of a kernel's demands.
pub(super) const FETCH_STEPS: usize = 16;
/// Demands that a kernel comes to in a block of k of full length.
const DEMANDS: usize = super::kernel::KC / FETCH_STEPS;

/// The lines that one kernel asks for: with its demand `i` those at `from + i * step` and `second` bytes further.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    pub(super) from: *const u8,
    pub(super) step: isize,
    pub(super) second: isize,
}

impl Lines {
    /// A line that is near anyway.
    pub(super) fn none(near: *const f32) -> Self {
        Lines { from: near.cast(), step: 0, second: 0 }
    }
}

/// What one kernel fetches beside its own operands.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The tile of C that is next, whose rows are as far apart as those of this one.
    pub(super) c: *const f32,
    pub(super) a: Lines,
    pub(super) b: Lines,
}

impl Ahead {
    /// Only the tile of C.
    pub(super) fn only(c: *const f32) -> Self {
        Ahead { c, a: Lines::none(c), b: Lines::none(c) }
    }
}

/// A part of an operand, for kernel after kernel to fetch: runs of contiguous memory, equally far apart.
pub(super) struct Region {
    from: *const u8,
    /// Bytes from run to run.
    step: isize,
    /// Pairs of runs (or of lines, if those of a run are few), and how many kernels each takes.
    pairs: usize,
    parts: usize,
    /// Whether a kernel follows two runs, or takes two lines of many runs.
    along: bool,
    /// Which pair is the next kernel's, and which part of that.
    pair: usize,
    part: usize,
}

impl Region {
    /// Nothing.
    pub(super) const NONE: Self =
        Region { from: std::ptr::null(), step: 0, pairs: 0, parts: 1, along: true, pair: 0, part: 0 };

    /// The `rows x cols` elements of `mat` from its first one on; nothing if they do not lie in runs.
    pub(super) fn of(mat: Mat, rows: usize, cols: usize) -> Self {
        let (runs, length, stride) = match (mat.row_stride, mat.col_stride) {
            (stride, 1) => (rows, cols, stride),
            (1, stride) => (cols, rows, stride),
            _ => return Region::NONE,
        };
        let bytes = mat.storage.bytes();
        let step = stride * bytes as isize;
        // Runs that begin within a line may reach into one more.
        let ragged = !mat.data.addr().is_multiple_of(LINE) || step % LINE as isize != 0;
        let lines = (length * bytes).div_ceil(LINE) + usize::from(ragged);
        let along = lines >= DEMANDS;
        let (pairs, parts) = match along {
            true => (runs.div_ceil(2), lines.div_ceil(DEMANDS)),
            false => (lines.div_ceil(2), runs.div_ceil(DEMANDS)),
        };
        Region { from: mat.data, step, pairs, parts, along, pair: 0, part: 0 }
    }

    /// The lines of the next kernel; the line at `near` when all are fetched.
    pub(super) fn next(&mut self, near: *const f32) -> Lines {
        if self.pair == self.pairs {
            return Lines::none(near);
        }
        let (pair, part) = (self.pair as isize, self.part as isize);
        self.part += 1;
        if self.part == self.parts {
            (self.pair, self.part) = (self.pair + 1, 0);
        }
        let line = LINE as isize;
        let (offset, step, second) = match self.along {
            true => (2 * pair * self.step + part * DEMANDS as isize * line, line, self.step),
            false => (2 * pair * line + part * DEMANDS as isize * self.step, self.step, line),
        };
        Lines { from: self.from.wrapping_offset(offset), step, second }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::cpu::gemm::Storage;

    /// The lines that a region's kernels ask for, in bytes from its first element.
    fn asked(mat: Mat, rows: usize, cols: usize) -> BTreeSet<isize> {
        let mut region = Region::of(mat, rows, cols);
        let mut asked = BTreeSet::new();
        for _ in 0..region.pairs * region.parts {
            let lines = region.next(std::ptr::null());
            for i in 0..DEMANDS as isize {
                for second in [0, lines.second] {
                    let at = lines.from.wrapping_offset(i * lines.step + second);
                    asked.insert((at as isize - mat.data as isize).div_euclid(LINE as isize));
                }
            }
        }
        let near = 0.0;
        assert_eq!(region.next(&raw const near).from, (&raw const near).cast());
        asked
    }

    #[test]
    fn every_line_of_a_region_is_asked_for() {
        let start = LINE as *mut u8;
        for storage in [Storage::F32, Storage::Bf16] {
            for (rows, cols) in [(56, 256), (53, 256), (1, 1), (256, 56), (256, 256), (14, 250), (3, 700)] {
                for (row_stride, col_stride) in [(1024, 1), (cols as isize, 1), (1, 2048), (1, rows as isize)] {
                    let mat = Mat { data: start, storage, row_stride, col_stride };
                    let asked = asked(mat, rows, cols);
                    for row in 0..rows as isize {
                        for col in 0..cols as isize {
                            let byte = (row * row_stride + col * col_stride) * storage.bytes() as isize;
                            assert!(asked.contains(&(byte / LINE as isize)), "{rows} {cols} {row_stride} {row} {col}");
                        }
                    }
                    let wanted = rows.div_ceil(2) * cols.div_ceil(2);
                    assert!(asked.len() <= 64 * wanted.max(1), "{rows} {cols}: {} lines", asked.len());
                }
            }
        }
        let scattered = Mat { data: start, storage: Storage::F32, row_stride: 7, col_stride: 5 };
        assert!(asked(scattered, 9, 9).is_empty());
    }
}
