//! Copies between strided views: transpose, slice, pad, broadcast, concatenation.

use bytemuck::Pod;

use super::par::{Shared, TASK, tasks};

/// The most dimensions a view may have.
pub const MAX_DIMS: usize = 8;

/// The side of the square a transposition goes through, on the stack.
const SIDE: usize = 32;

/// One loop of the copy: extent and both strides.
#[derive(Clone, Copy, Default)]
struct Dim {
    n: usize,
    dst: usize,
    src: usize,
}

/// The loops of a copy, outermost first, all of extent > 1.
struct Nest {
    dims: [Dim; MAX_DIMS],
    rank: usize,
}

impl Nest {
    /// Orders the loops by the stride of `dst` and merges those that walk both sides alike.
    fn new(shape: &[usize], dst: &[usize], src: &[usize]) -> Nest {
        let (mut sorted, mut rank) = ([Dim::default(); MAX_DIMS], 0);
        for i in (0..shape.len()).filter(|&i| shape[i] != 1) {
            let dim = Dim { n: shape[i], dst: dst[i], src: src[i] };
            let mut at = rank;
            while at > 0 && sorted[at - 1].dst < dim.dst {
                sorted[at] = sorted[at - 1];
                at -= 1;
            }
            sorted[at] = dim;
            rank += 1;
        }
        let mut nest = Nest { dims: [Dim::default(); MAX_DIMS], rank: 0 };
        for &dim in &sorted[..rank] {
            if nest.rank > 0 {
                let outer = &mut nest.dims[nest.rank - 1];
                if outer.dst == dim.n * dim.dst && outer.src == dim.n * dim.src {
                    *outer = Dim { n: outer.n * dim.n, ..dim };
                    continue;
                }
            }
            nest.dims[nest.rank] = dim;
            nest.rank += 1;
        }
        nest
    }

    /// Offsets of the last element on both sides, or None when `dst` may overlap itself.
    fn last(&self) -> Option<(usize, usize)> {
        let (mut dst, mut src) = (0, 0);
        for dim in self.dims[..self.rank].iter().rev() {
            if dim.dst <= dst {
                return None;
            }
            dst += (dim.n - 1) * dim.dst;
            src += (dim.n - 1) * dim.src;
        }
        Some((dst, src))
    }

    /// Takes loop `i` out of the nest.
    fn take(&mut self, i: usize) -> Dim {
        let dim = self.dims[i];
        self.dims.copy_within(i + 1..self.rank, i);
        self.rank -= 1;
        dim
    }

    fn count(&self) -> usize {
        self.dims[..self.rank].iter().map(|d| d.n).product()
    }

    /// Offsets (dst, src) of iteration `i`.
    fn at(&self, mut i: usize) -> (usize, usize) {
        let (mut dst, mut src) = (0, 0);
        for dim in self.dims[..self.rank].iter().rev() {
            dst += i % dim.n * dim.dst;
            src += i % dim.n * dim.src;
            i /= dim.n;
        }
        (dst, src)
    }
}

/// dst[dst_offset + i . dst_strides] = src[src_offset + i . src_strides] for every index i below `shape`.
///
/// Offsets and strides are in elements; a source stride of 0 broadcasts. Elements of `dst` outside the view stay.
/// `U` is any plain type of the element's size (u8, u16, u32, ...).
/// Fast when the last loop is contiguous on both sides (rows are copied) or when the contiguous loop of the source is
/// another than that of the destination (a transposition in squares).
/// Panics when the ranks differ or exceed [`MAX_DIMS`], when a view leaves its slice, or when two indices of the
/// destination could meet (strides, from the largest on, must each exceed the span of the smaller ones).
pub fn copy_strided<U: Pod + Send + Sync>(
    shape: &[usize],
    dst: &mut [U],
    dst_offset: usize,
    dst_strides: &[usize],
    src: &[U],
    src_offset: usize,
    src_strides: &[usize],
) {
    assert!(shape.len() <= MAX_DIMS && dst_strides.len() == shape.len() && src_strides.len() == shape.len());
    if shape.contains(&0) {
        return;
    }
    let mut nest = Nest::new(shape, dst_strides, src_strides);
    let last = nest.last();
    assert!(last.is_some(), "the destination overlaps itself");
    let (dst_last, src_last) = last.unwrap_or_default();
    let src = &src[src_offset..=src_offset + src_last];
    let dst = Shared::new(&mut dst[dst_offset..=dst_offset + dst_last]);
    if nest.rank == 0 {
        // SAFETY: the only part.
        let only = unsafe { dst.part(0, 1) };
        only[0] = src[0];
        return;
    }
    let inner = nest.take(nest.rank - 1);
    let across = (0..nest.rank).find(|&i| nest.dims[i].src == 1);
    match across {
        Some(i) if inner.dst == 1 && inner.src > 1 => {
            let across = nest.take(i);
            transpose(&nest, across, inner, &dst, src);
        }
        Some(_) | None => rows(&nest, inner, &dst, src),
    }
}

/// The loops of `nest` around runs along `inner`.
fn rows<U: Pod + Send + Sync>(nest: &Nest, inner: Dim, dst: &Shared<'_, U>, src: &[U]) {
    let count = nest.count();
    let pieces = inner.n.div_ceil(TASK);
    let per_task = (TASK / inner.n).max(1);
    let total = count * pieces;
    tasks(total.div_ceil(per_task), count * inner.n, |task| {
        for i in task * per_task..total.min((task + 1) * per_task) {
            let (d, s) = nest.at(i / pieces);
            let from = i % pieces * TASK;
            let n = TASK.min(inner.n - from);
            let src = &src[s + from * inner.src..=s + (from + n - 1) * inner.src];
            if inner.dst == 1 {
                // SAFETY: the indices of the destination are distinct, and this run is one task's.
                let dst = unsafe { dst.part(d + from, n) };
                match inner.src {
                    1 => dst.copy_from_slice(src),
                    0 => dst.fill(src[0]),
                    step => dst.iter_mut().zip(src.iter().step_by(step)).for_each(|(d, s)| *d = *s),
                }
            } else {
                for j in 0..n {
                    // SAFETY: as above; element by element, because runs of a larger stride interleave.
                    let one = unsafe { dst.part(d + (from + j) * inner.dst, 1) };
                    one[0] = src[j * inner.src];
                }
            }
        }
    });
}

/// The loops of `nest` around squares of `across` (contiguous in the source) by `inner` (contiguous in `dst`). Through
/// a buffer, so that whole cache lines are read and written even where strides are powers of two.
fn transpose<U: Pod + Send + Sync>(nest: &Nest, across: Dim, inner: Dim, dst: &Shared<'_, U>, src: &[U]) {
    let (count, bands, columns) = (nest.count(), across.n.div_ceil(SIDE), inner.n.div_ceil(SIDE));
    let squares = count * bands * columns;
    let per_task = (TASK / (SIDE * SIDE)).max(1);
    tasks(squares.div_ceil(per_task), count * across.n * inner.n, |task| {
        for square in task * per_task..squares.min((task + 1) * per_task) {
            let (d, s) = nest.at(square / (bands * columns));
            let (a, b) = (square / columns % bands * SIDE, square % columns * SIDE);
            let (wide, high) = (SIDE.min(across.n - a), SIDE.min(inner.n - b));
            let mut buffer = [[U::zeroed(); SIDE]; SIDE];
            for (j, row) in buffer[..high].iter_mut().enumerate() {
                let at = s + (b + j) * inner.src + a;
                row[..wide].copy_from_slice(&src[at..at + wide]);
            }
            for i in 0..wide {
                // SAFETY: the indices of the destination are distinct, and this square is one task's.
                let row = unsafe { dst.part(d + (a + i) * across.dst + b, high) };
                for (j, out) in row.iter_mut().enumerate() {
                    *out = buffer[j][i];
                }
            }
        }
    });
}

/// Writes `value` everywhere, as padding needs it before the copy.
pub fn fill<U: Pod + Send + Sync>(dst: &mut [U], value: U) {
    let len = dst.len();
    let dst = Shared::new(dst);
    tasks(len.div_ceil(TASK), len, |task| {
        // SAFETY: tasks have disjoint elements.
        unsafe { dst.part(task * TASK, TASK.min(len - task * TASK)) }.fill(value);
    });
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, same_on_any_thread_count};
    use super::*;

    fn row_major(shape: &[usize]) -> Vec<usize> {
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        strides
    }

    fn naive<U: Copy>(shape: &[usize], dst: &mut [U], ds: (usize, &[usize]), src: &[U], ss: (usize, &[usize])) {
        for mut i in 0..shape.iter().product() {
            let (mut d, mut s) = (ds.0, ss.0);
            for a in (0..shape.len()).rev() {
                d += i % shape[a] * ds.1[a];
                s += i % shape[a] * ss.1[a];
                i /= shape[a];
            }
            dst[d] = src[s];
        }
    }

    /// Random permutations, slices, broadcasts and padding in up to 8 dimensions, for each element size.
    #[test]
    fn against_a_naive_walk() {
        let mut rng = Rng(40);
        for round in 0..300 {
            let rank = rng.below(if round % 2 == 0 { 4 } else { MAX_DIMS + 1 });
            let most = if rank <= 3 { 50 } else { 4 };
            let shape: Vec<usize> = (0..rank).map(|_| rng.below(most) + usize::from(round % 7 != 0)).collect();
            // Each side lies row-major in its own permutation of the axes, with room left between rows.
            let layout = |broadcast: bool, rng: &mut Rng| {
                let mut axes: Vec<usize> = (0..rank).collect();
                for i in 0..rank {
                    let j = rng.below(i + 1);
                    axes.swap(i, j);
                }
                let mut strides = vec![0; rank];
                let mut size = 1;
                for &a in axes.iter().rev() {
                    if broadcast && rng.below(4) == 0 {
                        continue;
                    }
                    strides[a] = size;
                    size *= shape[a].max(1) + usize::from(rng.below(4) == 0);
                }
                (rng.below(3), strides, size + 3)
            };
            let (d, dst_strides, dst_len) = layout(false, &mut rng);
            let (s, src_strides, src_len) = layout(true, &mut rng);
            let src: Vec<u32> = (0..src_len).map(|_| rng.next() as u32).collect();
            let mut want = vec![0xdead_beef; dst_len];
            naive(&shape, &mut want, (d, &dst_strides), &src, (s, &src_strides));
            let mut got = vec![0xdead_beef; dst_len];
            copy_strided(&shape, &mut got, d, &dst_strides, &src, s, &src_strides);
            assert_eq!(got, want, "{shape:?} {dst_strides:?} {src_strides:?}");
            let low: Vec<u8> = src.iter().map(|&v| v as u8).collect();
            let (mut want, mut got) = (vec![7; dst_len], vec![7; dst_len]);
            naive(&shape, &mut want, (d, &dst_strides), &low, (s, &src_strides));
            copy_strided(&shape, &mut got, d, &dst_strides, &low, s, &src_strides);
            assert_eq!(got, want);
        }
    }

    #[test]
    fn large_transpose_and_copy_on_any_thread_count() {
        let (rows, columns) = (300, 517);
        let src: Vec<u16> = (0..rows * columns).map(|i| i as u16).collect();
        let got = same_on_any_thread_count(|| {
            let mut out = vec![0; src.len()];
            copy_strided(&[columns, rows], &mut out, 0, &[rows, 1], &src, 0, &[1, columns]);
            out
        });
        assert!((0..src.len()).all(|i| got[i] == src[i % rows * columns + i / rows]));
        let mut out = vec![0; src.len()];
        copy_strided(&[rows, columns], &mut out, 0, &row_major(&[rows, columns]), &src, 0, &[columns, 1]);
        assert_eq!(out, src);
        fill(&mut out, 3);
        assert!(out.iter().all(|&v| v == 3));
    }

    #[test]
    #[should_panic(expected = "overlaps itself")]
    fn an_overlapping_destination_is_refused() {
        copy_strided(&[2, 3], &mut [0u8; 9], 0, &[2, 1], &[0u8; 6], 0, &[3, 1]);
    }
}
