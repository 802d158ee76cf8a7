//! What a task packs next is brought into L2 while the kernel computes: memory takes its time, and packing only waits.

use super::Mat;

const LINE: usize = 64;

/// Runs of memory, fetched a few cache lines at a time.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The current run, and bytes to the next one.
    run: *const u8,
    step: isize,
    /// Runs left, the current one included.
    runs: usize,
    bytes: usize,
    /// Bytes of the current run that are done.
    done: usize,
}

impl Ahead {
    /// Nothing to fetch.
    pub(super) fn nothing() -> Ahead {
        Ahead { run: std::ptr::null(), step: 0, runs: 0, bytes: 0, done: 0 }
    }

    /// The first `rows x cols` values of a matrix; nothing if neither its rows nor its columns are contiguous.
    pub(super) fn of(mat: &Mat, rows: usize, cols: usize) -> Ahead {
        let size = mat.storage.bytes();
        let (runs, values, step) = match (mat.row_stride, mat.col_stride) {
            (step, 1) => (rows, cols, step),
            (1, step) => (cols, rows, step),
            _ => return Ahead::nothing(),
        };
        // A run may begin anywhere in its first line.
        Ahead { run: mat.data, step: step * size as isize, runs, bytes: values * size + LINE - 1, done: 0 }
    }

    /// Cache lines left.
    pub(super) fn lines(&self) -> usize {
        (self.runs * self.bytes.div_ceil(LINE)).saturating_sub(self.done / LINE)
    }

    /// Fetches the next `lines` lines, or what is left.
    pub(super) fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.runs == 0 {
                return;
            }
            prefetch(self.run.wrapping_add(self.done));
            self.done += LINE;
            if self.done >= self.bytes {
                self.done = 0;
                self.runs -= 1;
                self.run = self.run.wrapping_offset(self.step);
            }
        }
    }
}

/// Brings a cache line into L2; any address is fine.
fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_fetched_once() {
        let data = [0f32; 64 * 40];
        for (rows, cols, row_stride, col_stride) in [(5, 40, 64, 1), (40, 5, 1, 64)] {
            let mut ahead = Ahead::of(&Mat::new(data.as_ptr(), row_stride, col_stride), rows, cols);
            // 160 bytes of a run that may begin anywhere in a line touch at most 4.
            let (mut left, mut last) = (5 * 4, 0);
            assert_eq!(ahead.lines(), left);
            while ahead.lines() > 0 {
                ahead.fetch(3);
                last = left.min(3);
                left -= last;
                assert_eq!(ahead.lines(), left);
            }
            assert_eq!(last, 2);
            assert_eq!(ahead.run, data.as_ptr().wrapping_add(5 * 64).cast());
        }
        assert_eq!(Ahead::of(&Mat::new(data.as_ptr(), 2, 3), 5, 5).lines(), 0);
        assert_eq!(Ahead::of(&Mat::new(data.as_ptr(), 64, 1), 0, 5).lines(), 0);
    }
}
