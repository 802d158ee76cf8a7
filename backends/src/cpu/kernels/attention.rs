//! Attention over whole sequences (training and prefill), flash style: exact, without a tokens x tokens matrix.
//!
//! Dao et al., "FlashAttention" (arXiv:2205.14135), algorithms 1 and 4. Here the vector lanes run over queries.

use crate::cpu::crew;
use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::product::{Left, Start, product};
use crate::cpu::kernels::rows::sum_over;
use crate::cpu::kernels::tile::{
    LANES, Shared, TILE, as_f32, cut, lanes, load_rows, share_out, transpose, workspace_of,
};
use crate::cpu::vmath::{self, BLOCK, map_block};

/// The shape of an attention over packed operands.
///
/// `qkv` is [batch, tokens, (heads + 2 kv_heads) head_dim]: in each row first all query heads, then the key heads, then
/// the value heads. Query head h uses key and value head h / (heads / kv_heads).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each sequence.
    pub tokens: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads, at least 1.
    pub kv_heads: usize,
    /// Columns of one head.
    pub head_dim: usize,
    /// Whether a token sees only itself and earlier ones.
    pub causal: bool,
    /// The factor on the scores, usually 1 / sqrt(head_dim).
    pub scale: f32,
}

impl AttentionShape {
    /// Columns of a row of `qkv`.
    pub const fn packed(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Below this many multiplications waking another thread costs more than it brings.
    fn parallel(&self) -> bool {
        self.batch * self.heads * self.tokens * self.tokens * self.head_dim > 1 << 17
    }

    fn check(&self) {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "head counts of {self:?}");
    }
}

/// Heads for each thread from which on a task is a head: with fewer, one thread would be left with the last.
const HEADS_PER_THREAD: usize = 8;

/// Workspace of [`attention`] in f32, for `threads` threads. It does not grow with the number of tokens.
pub const fn attention_workspace(shape: &AttentionShape, threads: usize) -> usize {
    workspace_of(threads, attend_scratch(shape.head_dim))
}

/// out = softmax(scale q k^T, masked) v for each query head, and the log of each softmax's denominator.
///
/// `qkv` as in [`AttentionShape`]; `out` [batch, tokens, heads head_dim]; `lse` [batch, heads, tokens], the natural
/// logsumexp of a query's scaled, visible scores. A causal row's bits depend on nothing but the tokens up to it, not on
/// `tokens` nor on the thread count.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`attention_workspace`] (bugs of the caller).
pub fn attention<T: Element>(shape: &AttentionShape, qkv: &[T], out: &mut [T], lse: &mut [f32], workspace: &mut [f32]) {
    shape.check();
    let AttentionShape { batch, tokens, heads, kv_heads, head_dim, causal, scale } = *shape;
    let (ld, ld_out) = (shape.packed(), heads * head_dim);
    assert_eq!(qkv.len(), batch * tokens * ld);
    assert_eq!(out.len(), batch * tokens * ld_out);
    assert_eq!(lse.len(), batch * heads * tokens);
    if out.is_empty() && lse.is_empty() {
        return;
    }
    let tiles = tokens.div_ceil(TILE);
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let attend_tile = |tile: usize, head: usize, scratch: &mut [f32]| {
        let (b, h) = (head / heads, head % heads);
        let sequence = &qkv[b * tokens * ld..][..tokens * ld];
        let kv = h / (heads / kv_heads);
        let first = tile * TILE;
        let rows = TILE.min(tokens - first);
        attend(
            &Attend {
                rows,
                position: first,
                keys: tokens,
                head_dim,
                causal,
                scale,
                q: (&sequence[first * ld + h * head_dim..], ld),
                k: (&sequence[(heads + kv) * head_dim..], ld),
                v: (&sequence[(heads + kv_heads + kv) * head_dim..], ld),
            },
            (&out, (b * tokens + first) * ld_out + h * head_dim, ld_out),
            // SAFETY: one task has this head and these rows.
            Some(unsafe { lse.piece(head * tokens + first, rows) }),
            scratch,
        );
    };
    let (all, room) = (batch * heads, attend_scratch(head_dim));
    if all >= HEADS_PER_THREAD * crew::threads() {
        // A head's keys and values stay in cache for all of its queries.
        share_out(all, shape.parallel(), workspace, room, |head, scratch| {
            (0..tiles).for_each(|tile| attend_tile(tile, head, scratch));
        });
    } else {
        // The longest tasks of a causal mask come first, so that the threads finish together.
        share_out(all * tiles, shape.parallel(), workspace, room, |task, scratch| {
            attend_tile(tiles - 1 - task / all, task % all, scratch);
        });
    }
}

/// One head's attention of at most [`TILE`] consecutive queries; operands as (elements, distance of rows).
pub(super) struct Attend<'a, T> {
    /// Queries.
    pub(super) rows: usize,
    /// Position of the first query among the keys.
    pub(super) position: usize,
    /// Keys there are; a causal query at position p sees keys 0..=p of them.
    pub(super) keys: usize,
    pub(super) head_dim: usize,
    pub(super) causal: bool,
    pub(super) scale: f32,
    pub(super) q: (&'a [T], usize),
    pub(super) k: (&'a [T], usize),
    pub(super) v: (&'a [T], usize),
}

/// f32 that [`attend`] works in: rows of keys, of values and of the result, queries in lanes, scores, three per-query
/// numbers.
pub(super) const fn attend_scratch(head_dim: usize) -> usize {
    2 * TILE * (head_dim + lanes(head_dim)) + TILE * TILE + 3 * TILE
}

/// Computes one task. Row r of the result goes to `out` at `start + r * ld`, `head_dim` elements that are the task's own.
pub(super) fn attend<T: Element>(
    job: &Attend<'_, T>,
    (out, start, ld_out): (&Shared<T>, usize, usize),
    lse: Option<&mut [f32]>,
    mut scratch: &mut [f32],
) {
    let &Attend { rows, position, keys, head_dim, causal, scale, q, k, v } = job;
    let wide = lanes(head_dim);
    let loaded = cut(&mut scratch, TILE * head_dim);
    let values = cut(&mut scratch, TILE * wide);
    let queries = cut(&mut scratch, TILE * head_dim);
    let result = cut(&mut scratch, TILE * wide);
    let scores = cut(&mut scratch, TILE * TILE);
    let max = cut(&mut scratch, TILE);
    let sum = cut(&mut scratch, TILE);
    let rescale = cut(&mut scratch, TILE);
    let n = lanes(rows);
    simd(
        #[inline(always)]
        || {
            load_rows(rows, head_dim, q, scale, (loaded, head_dim));
            transpose(rows, head_dim, (loaded, head_dim), queries);
        },
    );
    // The columns that only fill a register up stay 0.
    values.fill(0.0);
    max.fill(f32::NEG_INFINITY);
    sum.fill(0.0);
    let end = if causal { keys.min(position + rows) } else { keys };
    for first in (0..end).step_by(TILE) {
        let count = TILE.min(end - first);
        let here = rows_of(count, head_dim, (&k.0[first * k.1..], k.1), loaded);
        // On the diagonal only the squares of LANES keys and LANES queries that hold a visible score are computed.
        let diagonal = causal && first + count > position + 1;
        let step = if diagonal { LANES } else { TILE };
        for key in (0..count).step_by(step) {
            let from = if diagonal { hidden(first + key, position, n) / LANES * LANES } else { 0 };
            let left = Left { data: &here.0[key * here.1..], row: here.1, step: 1 };
            let to = (&mut scores[key * TILE + from..], TILE);
            product([step.min(count - key), n - from, head_dim], left, (&queries[from..], TILE), Start::Zero, to);
        }
        let seen =
            |lane: usize| if diagonal { count.min((position + lane + LANES).saturating_sub(first)) } else { count };
        simd(
            #[inline(always)]
            || {
                if diagonal {
                    mask(scores, count, n, first, position);
                }
                for lane in (0..n).step_by(LANES) {
                    online_softmax(
                        &mut scores[lane..],
                        seen(lane),
                        &mut max[lane..],
                        &mut sum[lane..],
                        &mut rescale[lane..],
                    );
                }
                load_rows(count, head_dim, (&v.0[first * v.1..], v.1), 1.0, (values, wide));
            },
        );
        for lane in (0..rows).step_by(step) {
            let left = Left { data: &scores[lane..], row: 1, step: TILE };
            let before = if first == 0 { Start::Zero } else { Start::Scaled(&rescale[lane..]) };
            let to = (&mut result[lane * wide..], wide);
            let seen = if diagonal { seen(lane) } else { count };
            product([step.min(rows - lane), wide, seen], left, (values, wide), before, to);
        }
    }
    simd(
        #[inline(always)]
        || {
            for r in 0..rows {
                let inverse = 1.0 / sum[r];
                // SAFETY: the rows of one head are the task's own.
                let to = unsafe { out.piece(start + r * ld_out, head_dim) };
                for (to, from) in to.iter_mut().zip(&result[r * wide..]) {
                    *to = T::from_f32(from * inverse);
                }
            }
            if let Some(lse) = lse {
                for r in 0..rows {
                    lse[r] = max[r] + vmath::ln(sum[r]);
                }
            }
        },
    );
}

/// `rows` rows of `width` elements, `ld` apart, as f32, and how far they are apart: where they lie if they are f32, else copied to
/// `to`. For rows that are read once or twice.
fn rows_of<'a, T: Element>(
    rows: usize,
    width: usize,
    (from, ld): (&'a [T], usize),
    to: &'a mut [f32],
) -> (&'a [f32], usize) {
    if let Some(from) = as_f32(from) {
        return (from, ld);
    }
    simd(
        #[inline(always)]
        || load_rows(rows, width, (from, ld), 1.0, (&mut *to, width)),
    );
    (to, width)
}

/// How many of the `n` lanes do not see a key: those of queries, from `position` on, that come before it.
#[inline(always)]
fn hidden(key: usize, position: usize, n: usize) -> usize {
    key.saturating_sub(position).min(n)
}

/// Sets the scores [count, n] of keys from `first` on to -inf where the query at `position` + lane comes before the key.
#[inline(always)]
fn mask(scores: &mut [f32], count: usize, n: usize, first: usize, position: usize) {
    for key in 0..count {
        scores[key * TILE..][..hidden(first + key, position, n)].fill(f32::NEG_INFINITY);
    }
}

/// Keys that [`vmath::map_block`] takes in one step.
const KEYS: usize = BLOCK / LANES;

/// Turns the first [`LANES`] columns of scores [count, TILE] into exp(score - minus), and gives each row of them to `then`.
#[inline(always)]
fn exp_minus(scores: &mut [f32], count: usize, minus: &[f32; LANES], mut then: impl FnMut(usize, &mut [f32; LANES])) {
    for key in (0..count).step_by(KEYS) {
        let mut block = [[0.0f32; LANES]; KEYS];
        let keys = KEYS.min(count - key);
        for (i, row) in block.iter_mut().enumerate().take(keys) {
            let from = &scores[(key + i) * TILE..][..LANES];
            for x in 0..LANES {
                row[x] = from[x] - minus[x];
            }
        }
        block = bytemuck::cast(map_block!(&bytemuck::cast(block), vmath::exps_or_zero));
        for (i, row) in block.iter_mut().enumerate().take(keys) {
            then(key + i, row);
            scores[(key + i) * TILE..][..LANES].copy_from_slice(row);
        }
    }
}

/// Turns the first [`LANES`] columns of scores [count, TILE] into exp(score - max) for the running maximum of each lane,
/// with the sum brought up to date and the factor by which what was summed before must shrink.
#[inline(always)]
fn online_softmax(scores: &mut [f32], count: usize, max: &mut [f32], sum: &mut [f32], rescale: &mut [f32]) {
    const W: usize = LANES;
    let mut new = [0.0f32; W];
    new.copy_from_slice(&max[..W]);
    for key in 0..count {
        let row = &scores[key * TILE..][..W];
        for x in 0..W {
            new[x] = if row[x] > new[x] { row[x] } else { new[x] };
        }
    }
    let mut total = [0.0f32; W];
    for x in 0..W {
        let factor = vmath::exp_or_zero(max[x] - new[x]);
        rescale[x] = factor;
        total[x] = sum[x] * factor;
    }
    exp_minus(
        scores,
        count,
        &new,
        #[inline(always)]
        |_, row| {
            for x in 0..W {
                total[x] += row[x];
            }
        },
    );
    max[..W].copy_from_slice(&new);
    sum[..W].copy_from_slice(&total);
}

/// Workspace of [`attention_grad`] in f32, for `threads` threads: about 7 tokens x head_dim each.
pub const fn attention_grad_workspace(shape: &AttentionShape, threads: usize) -> usize {
    let tasks = shape.batch * shape.kv_heads;
    workspace_of(if threads < tasks { threads } else { tasks }, grad_scratch(shape))
}

const fn grad_scratch(shape: &AttentionShape) -> usize {
    let (tokens, head_dim) = (shape.tokens.next_multiple_of(TILE), shape.head_dim);
    tokens * (2 * head_dim + 5 * lanes(head_dim) + 2) + TILE * (head_dim + lanes(head_dim)) + 2 * TILE * TILE
}

/// The vjp of [`attention`]: the cotangent of `qkv`, of its shape, from the cotangent `dout` of `out`.
///
/// With P = exp(scale q k^T - lse): dv = P^T dout, dS = P (dout v^T - rowsum(dout out)), dq = scale dS k,
/// dk = scale dS^T q; P is computed again tile by tile. `out` and `lse` are what [`attention`] wrote. Threads share out
/// the (sequence, key head) pairs, so the sums have a fixed order.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`attention_grad_workspace`] (bugs of the caller).
pub fn attention_grad<T: Element>(
    shape: &AttentionShape,
    qkv: &[T],
    out: &[T],
    lse: &[f32],
    dout: &[T],
    dqkv: &mut [T],
    workspace: &mut [f32],
) {
    shape.check();
    let AttentionShape { batch, tokens, heads, kv_heads, head_dim, .. } = *shape;
    assert_eq!(qkv.len(), batch * tokens * shape.packed());
    assert_eq!(dqkv.len(), qkv.len());
    assert_eq!(out.len(), batch * tokens * heads * head_dim);
    assert_eq!(dout.len(), out.len());
    assert_eq!(lse.len(), batch * heads * tokens);
    if dqkv.is_empty() {
        return;
    }
    let dqkv = Shared::new(dqkv);
    share_out(batch * kv_heads, shape.parallel(), workspace, grad_scratch(shape), |task, scratch| {
        grad_of_kv_head(shape, qkv, out, lse, dout, &dqkv, (task / kv_heads, task % kv_heads), scratch);
    });
}

/// All cotangents that belong to key head `kv` of sequence `b`: its keys, its values and the queries that use them.
fn grad_of_kv_head<T: Element>(
    shape: &AttentionShape,
    qkv: &[T],
    out: &[T],
    lse: &[f32],
    dout: &[T],
    dqkv: &Shared<T>,
    (b, kv): (usize, usize),
    mut scratch: &mut [f32],
) {
    let AttentionShape { tokens, heads, kv_heads, head_dim, causal, scale, .. } = *shape;
    let (ld, ld_out, wide) = (shape.packed(), heads * head_dim, lanes(head_dim));
    let padded = tokens.next_multiple_of(TILE);
    let group = heads / kv_heads;
    let sequence = &qkv[b * tokens * ld..][..tokens * ld];
    let (k_column, v_column) = ((heads + kv) * head_dim, (heads + kv_heads + kv) * head_dim);
    // Rows of queries (times scale) and of dout, and the same in lanes, tile after tile.
    let q_rows = cut(&mut scratch, padded * wide);
    let d_rows = cut(&mut scratch, padded * wide);
    let q_lanes = cut(&mut scratch, padded * head_dim);
    let d_lanes = cut(&mut scratch, padded * head_dim);
    let dq = cut(&mut scratch, padded * wide);
    let dk = cut(&mut scratch, padded * wide);
    let dv = cut(&mut scratch, padded * wide);
    let denominators = cut(&mut scratch, padded);
    let deltas = cut(&mut scratch, padded);
    let k_tile = cut(&mut scratch, TILE * wide);
    let v_tile = cut(&mut scratch, TILE * head_dim);
    let p_tile = cut(&mut scratch, TILE * TILE);
    let ds_tile = cut(&mut scratch, TILE * TILE);
    if wide > head_dim {
        // The columns that only fill a register up stay 0.
        [&mut *q_rows, &mut *d_rows, &mut *k_tile].into_iter().for_each(|rows| rows.fill(0.0));
    }
    for h in kv * group..(kv + 1) * group {
        let (o, d) = ((b * tokens * ld_out) + h * head_dim, (b * heads + h) * tokens);
        simd(
            #[inline(always)]
            || {
                load_rows(tokens, head_dim, (&sequence[h * head_dim..], ld), scale, (q_rows, wide));
                load_rows(tokens, head_dim, (&dout[o..], ld_out), 1.0, (d_rows, wide));
                for first in (0..tokens).step_by(TILE) {
                    let rows = TILE.min(tokens - first);
                    transpose(rows, head_dim, (&q_rows[first * wide..], wide), &mut q_lanes[first * head_dim..]);
                    transpose(rows, head_dim, (&d_rows[first * wide..], wide), &mut d_lanes[first * head_dim..]);
                }
                for t in 0..tokens {
                    let (out, d) = (&out[o + t * ld_out..][..head_dim], &d_rows[t * wide..][..head_dim]);
                    deltas[t] = sum_over(out, d, d, |out, d, _| out * d);
                }
                denominators[..tokens].copy_from_slice(&lse[d..d + tokens]);
                // Lanes past the last token: their query and dout are 0, so any finite number leaves them without effect.
                denominators[tokens..].fill(0.0);
                deltas[tokens..].fill(0.0);
            },
        );
        for key in (0..tokens).step_by(TILE) {
            let count = TILE.min(tokens - key);
            simd(
                #[inline(always)]
                || {
                    load_rows(count, head_dim, (&sequence[key * ld + k_column..], ld), 1.0, (k_tile, wide));
                },
            );
            let (values, ld_values) = rows_of(count, head_dim, (&sequence[key * ld + v_column..], ld), v_tile);
            for first in (if causal { key } else { 0 }..tokens).step_by(TILE) {
                let rows = TILE.min(tokens - first);
                let n = lanes(rows);
                // As in the forward: on the diagonal squares of LANES keys and queries that see none are left out.
                let diagonal = causal && first == key;
                let step = if diagonal { LANES } else { TILE };
                for k in (0..count).step_by(step) {
                    let (size, from) = (step.min(count - k), if diagonal { k } else { 0 });
                    let at = first * head_dim + from;
                    let k_rows = Left { data: &k_tile[k * wide..], row: wide, step: 1 };
                    let v_rows = Left { data: &values[k * ld_values..], row: ld_values, step: 1 };
                    let (p, ds) = (&mut p_tile[k * TILE + from..], &mut ds_tile[k * TILE + from..]);
                    product([size, n - from, head_dim], k_rows, (&q_lanes[at..], TILE), Start::Zero, (p, TILE));
                    product([size, n - from, head_dim], v_rows, (&d_lanes[at..], TILE), Start::Zero, (ds, TILE));
                }
                simd(
                    #[inline(always)]
                    || {
                        if diagonal {
                            mask(p_tile, count, n, key, first);
                        }
                        for lane in (0..n).step_by(LANES) {
                            let seen = if diagonal { count.min(lane + LANES) } else { count };
                            let (mut minus, mut delta) = ([0.0f32; LANES], [0.0f32; LANES]);
                            minus.copy_from_slice(&denominators[first + lane..][..LANES]);
                            delta.copy_from_slice(&deltas[first + lane..][..LANES]);
                            exp_minus(
                                &mut p_tile[lane..],
                                seen,
                                &minus,
                                #[inline(always)]
                                |row, p| {
                                    let ds = &mut ds_tile[row * TILE + lane..][..LANES];
                                    for x in 0..LANES {
                                        ds[x] = p[x] * (ds[x] - delta[x]);
                                    }
                                },
                            );
                        }
                    },
                );
                // The first tile of queries that sees these keys, of the first head that uses them.
                let begins = h == kv * group && first == if causal { key } else { 0 };
                let added = if begins { Start::Zero } else { Start::Keep };
                for k in (0..count).step_by(step) {
                    let (size, from) = (step.min(count - k), if diagonal { k.min(rows) } else { 0 });
                    let (at, to) = ((first + from) * wide, (key + k) * wide);
                    let p = Left { data: &p_tile[k * TILE + from..], row: TILE, step: 1 };
                    let ds = Left { data: &ds_tile[k * TILE + from..], row: TILE, step: 1 };
                    let sizes = [size, wide, rows - from];
                    product(sizes, p, (&d_rows[at..], wide), added, (&mut dv[to..], wide));
                    product(sizes, ds, (&q_rows[at..], wide), added, (&mut dk[to..], wide));
                }
                // Every query sees the first tile of keys.
                let before = if key == 0 { Start::Zero } else { Start::Keep };
                for q in (0..rows).step_by(step) {
                    let seen = if diagonal { count.min(q + LANES) } else { count };
                    let ds = Left { data: &ds_tile[q..], row: 1, step: TILE };
                    let to = (&mut dq[(first + q) * wide..], wide);
                    product([step.min(rows - q), wide, seen], ds, (k_tile, wide), before, to);
                }
            }
        }
        simd(
            #[inline(always)]
            || {
                for t in 0..tokens {
                    // SAFETY: query head h of sequence b is this task's.
                    let to = unsafe { dqkv.piece((b * tokens + t) * ld + h * head_dim, head_dim) };
                    for (to, from) in to.iter_mut().zip(&dq[t * wide..]) {
                        *to = T::from_f32(from * scale);
                    }
                }
            },
        );
    }
    simd(
        #[inline(always)]
        || {
            for t in 0..tokens {
                let row = (b * tokens + t) * ld;
                for (column, from) in [(k_column, &*dk), (v_column, &*dv)] {
                    // SAFETY: key and value head `kv` of sequence b are this task's.
                    let to = unsafe { dqkv.piece(row + column, head_dim) };
                    for (to, from) in to.iter_mut().zip(&from[t * wide..]) {
                        *to = T::from_f32(*from);
                    }
                }
            }
        },
    );
}

#[cfg(test)]
#[path = "attention_tests.rs"]
pub(super) mod tests;
