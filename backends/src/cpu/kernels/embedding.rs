//! Rows of a table by id, and the gradient of the table.

use crate::cpu::element::{Element, simd};

use super::par::{Shared, row_tasks};

/// Columns summed at a time, in f32 whatever the storage type.
const COLUMNS: usize = 64;

/// An id for which the table has no row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("id {id} at position {position} is outside the table of {rows} rows")]
pub struct IdOutOfRange {
    /// The index into the ids.
    pub position: usize,
    /// The id found there.
    pub id: i32,
    /// The rows of the table: ids 0..rows are valid.
    pub rows: usize,
}

/// Finds the first id outside 0..rows.
fn check(ids: &[i32], rows: usize) -> Result<(), IdOutOfRange> {
    match ids.iter().position(|&id| id < 0 || id as usize >= rows) {
        None => Ok(()),
        Some(position) => Err(IdOutOfRange { position, id: ids[position], rows }),
    }
}

/// `out[i]` = `table[ids[i]]`: `table` [rows, d], `ids` `[n]`, `out` [n, d].
///
/// # Errors
/// [`IdOutOfRange`], before anything is written. Panics when the sizes disagree.
pub fn embedding<T: Element>(
    table: &[T],
    ids: &[i32],
    rows: usize,
    d: usize,
    out: &mut [T],
) -> Result<(), IdOutOfRange> {
    assert!(table.len() == rows * d && out.len() == ids.len() * d);
    check(ids, rows)?;
    let out = Shared::new(out);
    row_tasks(ids.len(), d, |from, to| {
        // SAFETY: tasks have disjoint positions.
        let out = unsafe { out.part(from * d, (to - from) * d) };
        for (i, &id) in ids[from..to].iter().enumerate() {
            out[i * d..(i + 1) * d].copy_from_slice(&table[id as usize * d..(id as usize + 1) * d]);
        }
    });
    Ok(())
}

/// The scratch [`embedding_grad`] needs for `n` ids and a table of `rows` rows, in i32 elements.
pub fn embedding_grad_workspace(n: usize, rows: usize) -> usize {
    n + rows + 1
}

/// `out[v]` = sum of `dy[i]` over the i with `ids[i]` = v, in the order of i, in f32; zeros for an unused row.
///
/// - `ids` `[n]`, `dy` [n, d]
/// - `out` [rows, d] is written
/// - `workspace` has [`embedding_grad_workspace`] elements
///
/// # Errors
/// [`IdOutOfRange`], before anything is written. Panics when the sizes disagree or n does not fit i32.
pub fn embedding_grad<T: Element, O: Element>(
    dy: &[T],
    ids: &[i32],
    rows: usize,
    d: usize,
    out: &mut [O],
    workspace: &mut [i32],
) -> Result<(), IdOutOfRange> {
    assert!(dy.len() == ids.len() * d && out.len() == rows * d);
    assert!(i32::try_from(ids.len()).is_ok(), "more ids than i32 holds");
    check(ids, rows)?;
    // A counting sort of the positions by id: afterwards id v has positions[start[v]..start[v + 1]].
    let (start, positions) = workspace[..embedding_grad_workspace(ids.len(), rows)].split_at_mut(rows + 1);
    start.fill(0);
    for &id in ids {
        start[id as usize] += 1;
    }
    let mut end = 0;
    for s in start.iter_mut() {
        end += *s;
        *s = end;
    }
    for (i, &id) in ids.iter().enumerate().rev() {
        let s = &mut start[id as usize];
        *s -= 1;
        positions[*s as usize] = i as i32;
    }
    let (start, positions) = (&*start, &*positions);
    let out = Shared::new(out);
    row_tasks(rows, d, |from, to| {
        // SAFETY: tasks have disjoint rows.
        let out = unsafe { out.part(from * d, (to - from) * d) };
        simd(
            #[inline(always)]
            || {
                for v in from..to {
                    let mine = &positions[start[v] as usize..start[v + 1] as usize];
                    let row = &mut out[(v - from) * d..(v - from + 1) * d];
                    if mine.is_empty() {
                        row.fill(O::zeroed());
                        continue;
                    }
                    for (block, out) in row.chunks_mut(COLUMNS).enumerate() {
                        let mut sum = [0.0_f32; COLUMNS];
                        for &i in mine {
                            let at = i as usize * d + block * COLUMNS;
                            for (s, v) in sum.iter_mut().zip(&dy[at..at + out.len()]) {
                                *s += v.to_f32();
                            }
                        }
                        for (o, &s) in out.iter_mut().zip(&sum) {
                            *o = O::from_f32(s);
                        }
                    }
                }
            },
        );
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::{Rng, assert_close, bits, same_on_any_thread_count};
    use super::*;
    use half::bf16;

    #[test]
    fn forward_and_gradient_against_naive_loops() {
        let mut rng = Rng(20);
        for (rows, n, d) in [(1, 1, 1), (5, 40, 3), (400, 300, 70), (3, 0, 4), (7, 2, 0)] {
            let (table, dy) = (rng.values(rows * d, 1.0), rng.values(n * d, 1.0));
            let ids: Vec<i32> = (0..n).map(|_| rng.below(rows) as i32).collect();
            let mut out = vec![f32::NAN; n * d];
            embedding(&table, &ids, rows, d, &mut out).unwrap();
            let mut want = vec![0.0; rows * d];
            for i in 0..n * d {
                let at = ids[i / d] as usize * d + i % d;
                assert_eq!(out[i], table[at]);
                want[at] += f64::from(dy[i]);
            }
            let mut workspace = vec![-1; embedding_grad_workspace(n, rows)];
            let mut got = vec![f32::NAN; rows * d];
            embedding_grad(&dy, &ids, rows, d, &mut got, &mut workspace).unwrap();
            assert_close(&got, &want, 1e-5);
            let low: Vec<bf16> = dy.iter().map(|&v| bf16::from_f32(v)).collect();
            embedding_grad(&low, &ids, rows, d, &mut got, &mut workspace).unwrap();
            assert_close(&got, &want, 0.1);
        }
    }

    #[test]
    fn an_id_outside_is_named_and_nothing_is_written() {
        let table = [1.0_f32; 6];
        for (ids, position, id) in [([0, 3, -1], 1, 3), ([2, 1, -1], 2, -1), ([i32::MIN, 0, 0], 0, i32::MIN)] {
            let want = Err(IdOutOfRange { position, id, rows: 3 });
            let mut out = [7.0_f32; 6];
            assert_eq!(embedding(&table, &ids, 3, 2, &mut out), want);
            let mut workspace = [9; 7];
            assert_eq!(embedding_grad(&table, &ids, 3, 2, &mut out, &mut workspace), want);
            assert_eq!((out, workspace), ([7.0; 6], [9; 7]));
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() {
        let mut rng = Rng(21);
        let (rows, n, d) = (300, 900, 65);
        let dy = rng.values(n * d, 1.0);
        let ids: Vec<i32> = (0..n).map(|_| rng.below(rows) as i32).collect();
        same_on_any_thread_count(|| {
            let (mut out, mut workspace) = (vec![f32::NAN; rows * d], vec![0; n + rows + 1]);
            embedding_grad(&dy, &ids, rows, d, &mut out, &mut workspace).unwrap();
            bits(&out)
        });
    }
}
