//! From a [`Gemm`] to its single problems: validation, and where each problem's operands begin.

use super::{Batch, Gather, Gemm, GemmError, Mat, MatMut};

impl Mat {
    /// The part from element `(i, j)` on.
    pub(super) fn from(self, i: isize, j: isize) -> Self {
        let elements = i * self.row_stride + j * self.col_stride;
        Mat { data: self.data.wrapping_offset(elements * self.storage.bytes() as isize), ..self }
    }
    /// Moved by a step in elements.
    fn step(self, elements: isize) -> Self {
        Mat { data: self.data.wrapping_offset(elements * self.storage.bytes() as isize), ..self }
    }
}

impl MatMut {
    /// The part from element `(i, j)` on.
    pub(super) fn from(self, i: isize, j: isize) -> Self {
        self.step(i * self.row_stride + j * self.col_stride)
    }
    fn step(self, elements: isize) -> Self {
        MatMut { data: self.data.wrapping_offset(elements * self.storage.bytes() as isize), ..self }
    }
}

/// One problem, its operands in place.
pub(super) struct Problem<'a> {
    pub(super) index: usize,
    pub(super) k: usize,
    /// The row of C, as [`super::Part`] counts, of the problem's first row.
    pub(super) first_row: usize,
    /// At the problem's first row and k, unless the list for that axis takes it there.
    pub(super) a: Mat,
    pub(super) b: Mat,
    pub(super) c: MatMut,
    pub(super) row_list: Option<&'a [i32]>,
    pub(super) k_list: Option<&'a [i32]>,
    /// Rows in no segment: written as zeros, without bias.
    pub(super) unused: bool,
}

/// Refuses offsets and lists that would lead out of the operands.
pub(super) fn check(gemm: &Gemm<'_>) -> Result<(), GemmError> {
    let (offsets, bound) = match gemm.batch {
        Batch::One | Batch::Strided { .. } => (None, gemm.m),
        Batch::MGrouped { offsets, .. } => (Some(offsets), gemm.m),
        Batch::KGrouped { offsets, .. } => (Some(offsets), gemm.k),
    };
    if let Some(offsets) = offsets {
        if offsets.is_empty() {
            return Err(GemmError::NoOffsets);
        }
        let mut least = 0;
        for (index, &found) in offsets.iter().enumerate() {
            if found < least || found as usize > bound || (index == 0 && found != 0) {
                return Err(GemmError::Offsets { index, found, bound });
            }
            least = found;
        }
    }
    if let Some(Gather { rows, source_rows }) = gemm.gather {
        if rows.len() != bound {
            return Err(GemmError::GatherLength { wanted: bound, found: rows.len() });
        }
        let bad = rows.iter().position(|&row| row < -1 || row as isize >= source_rows as isize);
        if let Some(index) = bad {
            return Err(GemmError::GatherRow { index, found: rows[index], rows: source_rows });
        }
    }
    Ok(())
}

/// How many problems there are; the unused rows of an M-grouped batch count as one.
pub(super) fn count(gemm: &Gemm<'_>) -> usize {
    match gemm.batch {
        Batch::One => 1,
        Batch::Strided { counts, .. } => counts[0] * counts[1],
        Batch::MGrouped { offsets, .. } => offsets.len(),
        Batch::KGrouped { offsets, .. } => offsets.len() - 1,
    }
}

/// First entry and length of a segment.
fn segment(offsets: &[i32], e: usize) -> (usize, usize) {
    (offsets[e] as usize, (offsets[e + 1] - offsets[e]) as usize)
}

/// M and K of problem `p`.
pub(super) fn size(gemm: &Gemm<'_>, p: usize) -> (usize, usize) {
    match gemm.batch {
        Batch::One | Batch::Strided { .. } => (gemm.m, gemm.k),
        Batch::MGrouped { offsets, .. } if p + 1 < offsets.len() => (segment(offsets, p).1, gemm.k),
        Batch::MGrouped { .. } if gemm.accumulate => (0, 0),
        Batch::MGrouped { offsets, .. } => (gemm.m - offsets[p] as usize, 0),
        Batch::KGrouped { offsets, .. } => (gemm.m, segment(offsets, p).1),
    }
}

/// Problem `p`.
pub(super) fn get<'a>(gemm: &Gemm<'a>, p: usize) -> Problem<'a> {
    let list = gemm.gather.map(|gather| gather.rows);
    let (_, k) = size(gemm, p);
    let whole = Problem {
        index: p,
        k,
        first_row: 0,
        a: gemm.a,
        b: gemm.b,
        c: gemm.c,
        row_list: list,
        k_list: None,
        unused: false,
    };
    match gemm.batch {
        Batch::One => whole,
        Batch::Strided { counts, a, b, c } => {
            let (x, y) = ((p / counts[1]) as isize, (p % counts[1]) as isize);
            Problem {
                a: gemm.a.step(x * a[0] + y * a[1]),
                b: gemm.b.step(x * b[0] + y * b[1]),
                c: gemm.c.step(x * c[0] + y * c[1]),
                ..whole
            }
        }
        Batch::MGrouped { offsets, b } => {
            let first = offsets[p] as usize;
            let unused = p + 1 == offsets.len();
            Problem {
                first_row: first,
                a: if list.is_none() { gemm.a.from(first as isize, 0) } else { gemm.a },
                b: if unused { gemm.b } else { gemm.b.step(p as isize * b) },
                c: gemm.c.from(first as isize, 0),
                row_list: list.map(|list| &list[first..]),
                unused,
                ..whole
            }
        }
        Batch::KGrouped { offsets, c } => {
            let first = offsets[p] as usize;
            Problem {
                a: if list.is_none() { gemm.a.from(0, first as isize) } else { gemm.a },
                b: gemm.b.from(first as isize, 0),
                c: gemm.c.step(p as isize * c),
                row_list: None,
                k_list: list.map(|list| &list[first..first + k]),
                ..whole
            }
        }
    }
}
