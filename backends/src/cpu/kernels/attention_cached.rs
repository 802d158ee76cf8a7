//! Attention of new tokens over a cache of the keys and values of all tokens so far (generation).

use crate::cpu::element::{Element, simd};
use crate::cpu::kernels::attention::{Attend, attend, attend_scratch};
use crate::cpu::kernels::product::{Left, Start, dots, product};
use crate::cpu::kernels::tile::{LANES, Shared, TILE, as_f32, cut, lanes, load_rows, share_out, workspace_of};
use crate::cpu::vmath;

/// The shape of a cached, causal attention. `qkv` is packed as in [`AttentionShape`](super::attention::AttentionShape).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CachedAttentionShape {
    /// Sequences.
    pub batch: usize,
    /// New tokens of each sequence.
    pub tokens: usize,
    /// Tokens that the cache of one sequence has room for.
    pub capacity: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads, at least 1.
    pub kv_heads: usize,
    /// Columns of one head.
    pub head_dim: usize,
    /// The factor on the scores, usually 1 / sqrt(head_dim).
    pub scale: f32,
}

/// The cache has no room for the new tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("attention_cached: {tokens} tokens after the first {start} do not fit a cache of {capacity}")]
pub struct CacheFull {
    /// Tokens already in the cache.
    pub start: usize,
    /// Tokens to be added.
    pub tokens: usize,
    /// Tokens the cache has room for.
    pub capacity: usize,
}

/// With at most this many new tokens each query is computed alone, its keys in place; with more, queries fill the lanes.
const FEW: usize = 3;

/// Workspace of [`attention_cached`] in f32, for `threads` threads.
pub const fn attention_cached_workspace(shape: &CachedAttentionShape, threads: usize) -> usize {
    workspace_of(threads, scratch_of(shape))
}

const fn scratch_of(shape: &CachedAttentionShape) -> usize {
    let (one, many) = (row_scratch(shape.head_dim), attend_scratch(shape.head_dim));
    if shape.tokens <= FEW { one } else { many }
}

const fn row_scratch(head_dim: usize) -> usize {
    2 * TILE * lanes(head_dim) + 2 * lanes(head_dim) + TILE
}

/// Writes the new keys and values into the caches at rows start..start + tokens, then gives each new token causal
/// attention over the cache: token i sees rows 0..=start + i.
///
/// `qkv` [batch, tokens, (heads + 2 kv_heads) head_dim]; `k_cache`, `v_cache` [batch, capacity, kv_heads head_dim];
/// `out` [batch, tokens, heads head_dim]. A token's result has the bits that [`attention`](super::attention::attention)
/// gives it in the whole text, however the text was cut into calls, and whatever the thread count.
///
/// # Errors
/// [`CacheFull`] if start + tokens exceeds the capacity; nothing has been written then.
///
/// # Panics
/// If a slice's length is not the shape's, or the workspace is below [`attention_cached_workspace`] (bugs of the caller).
pub fn attention_cached<T: Element>(
    shape: &CachedAttentionShape,
    qkv: &[T],
    start: usize,
    k_cache: &mut [T],
    v_cache: &mut [T],
    out: &mut [T],
    workspace: &mut [f32],
) -> Result<(), CacheFull> {
    let CachedAttentionShape { batch, tokens, capacity, heads, kv_heads, head_dim, scale } = *shape;
    if start > capacity || tokens > capacity - start {
        return Err(CacheFull { start, tokens, capacity });
    }
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "head counts of {shape:?}");
    let (ld, ld_cache, ld_out) = ((heads + 2 * kv_heads) * head_dim, kv_heads * head_dim, heads * head_dim);
    assert_eq!(qkv.len(), batch * tokens * ld);
    assert_eq!(k_cache.len(), batch * capacity * ld_cache);
    assert_eq!(v_cache.len(), k_cache.len());
    assert_eq!(out.len(), batch * tokens * ld_out);
    for b in 0..batch {
        for t in 0..tokens {
            let new = &qkv[(b * tokens + t) * ld + ld_out..][..2 * ld_cache];
            let at = (b * capacity + start + t) * ld_cache;
            k_cache[at..at + ld_cache].copy_from_slice(&new[..ld_cache]);
            v_cache[at..at + ld_cache].copy_from_slice(&new[ld_cache..]);
        }
    }
    if out.is_empty() {
        return Ok(());
    }
    let (k_cache, v_cache) = (&*k_cache, &*v_cache);
    let tiles = if tokens <= FEW { 1 } else { tokens.div_ceil(TILE) };
    // Below this many multiplications waking another thread costs more than it brings.
    let parallel = batch * heads * tokens * (start + tokens) * head_dim > 1 << 14;
    let out = Shared::new(out);
    share_out(batch * heads * tiles, parallel, workspace, scratch_of(shape), |task, scratch| {
        let (tile, head) = (tiles - 1 - task / (batch * heads), task % (batch * heads));
        let (b, h) = (head / heads, head % heads);
        let cached = b * capacity * ld_cache + h / (heads / kv_heads) * head_dim;
        let first = tile * TILE;
        let job = Attend {
            rows: TILE.min(tokens - first),
            position: start + first,
            keys: start + tokens,
            head_dim,
            causal: true,
            scale,
            q: (&qkv[(b * tokens + first) * ld + h * head_dim..], ld),
            k: (&k_cache[cached..], ld_cache),
            v: (&v_cache[cached..], ld_cache),
        };
        let to = (&out, (b * tokens + first) * ld_out + h * head_dim, ld_out);
        if tokens <= FEW {
            for row in 0..tokens {
                attend_row(&job, row, to, scratch);
            }
        } else {
            attend(&job, to, None, scratch);
        }
    });
    Ok(())
}

/// What [`attend`] computes for one of the job's queries, with the same operations in the same order on each number,
/// but with the lanes over the columns of the values: no lanes idle when there is one query.
fn attend_row<T: Element>(
    job: &Attend<'_, T>,
    row: usize,
    (out, start, ld_out): (&Shared<T>, usize, usize),
    mut scratch: &mut [f32],
) {
    let &Attend { position, head_dim, scale, q, k, v, .. } = job;
    let wide = lanes(head_dim);
    let k_tile = cut(&mut scratch, TILE * head_dim);
    let v_tile = cut(&mut scratch, TILE * wide);
    let query = cut(&mut scratch, wide);
    let result = cut(&mut scratch, wide);
    let scores = cut(&mut scratch, TILE);
    // Values whose rows fill whole registers are read in place.
    let in_place = (as_f32(k.0), as_f32(v.0).filter(|_| wide == head_dim));
    if in_place.1.is_none() {
        v_tile.fill(0.0);
    }
    simd(
        #[inline(always)]
        || load_rows(1, head_dim, (&q.0[row * q.1..], q.1), scale, (query, wide)),
    );
    let (mut max, mut sum, mut rescale) = (f32::NEG_INFINITY, 0.0, 0.0);
    let end = position + row + 1;
    for first in (0..end).step_by(TILE) {
        let count = TILE.min(end - first);
        let keys = match in_place.0 {
            Some(keys) => (&keys[first * k.1..], k.1),
            None => {
                simd(
                    #[inline(always)]
                    || load_rows(count, head_dim, (&k.0[first * k.1..], k.1), 1.0, (k_tile, head_dim)),
                );
                (&*k_tile, head_dim)
            }
        };
        dots(count, head_dim, keys, query, scores);
        simd(
            #[inline(always)]
            || {
                (max, sum, rescale) = online_softmax(&mut scores[..count], max, sum);
                if in_place.1.is_none() {
                    load_rows(count, head_dim, (&v.0[first * v.1..], v.1), 1.0, (v_tile, wide));
                }
            },
        );
        let values = match in_place.1 {
            Some(values) => (&values[first * v.1..], v.1),
            None => (&*v_tile, wide),
        };
        let before = if first == 0 { Start::Zero } else { Start::Scaled(std::slice::from_ref(&rescale)) };
        product([1, wide, count], Left { data: scores, row: 0, step: 1 }, values, before, (result, wide));
    }
    let inverse = 1.0 / sum;
    // SAFETY: the rows of one head are the task's own.
    let to = unsafe { out.piece(start + row * ld_out, head_dim) };
    for (to, from) in to.iter_mut().zip(&*result) {
        *to = T::from_f32(*from * inverse);
    }
}

/// The running maximum and sum of one query after its next scores, which become exp(score - maximum), and the factor by
/// which what was summed before must shrink.
#[inline(always)]
fn online_softmax(scores: &mut [f32], max: f32, sum: f32) -> (f32, f32, f32) {
    let mut maxima = [max; LANES];
    for part in scores.chunks(LANES) {
        for (max, &score) in maxima.iter_mut().zip(part) {
            *max = if score > *max { score } else { *max };
        }
    }
    let new = maxima.iter().fold(max, |max, &x| if x > max { x } else { max });
    let factor = vmath::exp_or_zero(max - new);
    for score in scores.iter_mut() {
        *score = vmath::exp_or_zero(*score - new);
    }
    let mut total = sum * factor;
    for p in scores.iter() {
        total += p;
    }
    (new, total, factor)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::crew::Crew;
    use crate::cpu::kernels::attention::tests::values;
    use crate::cpu::kernels::attention::{AttentionShape, attention, attention_workspace};

    /// Runs a text of `cuts.last()` tokens in calls that end at each of `cuts`; the outputs [batch, tokens, ..] together.
    fn in_calls<T: Element>(whole: &AttentionShape, qkv: &[T], cuts: &[usize], threads: usize) -> Vec<T> {
        let nan = T::from_f32(f32::NAN);
        let AttentionShape { batch, tokens, heads, kv_heads, head_dim, scale, .. } = *whole;
        let capacity = tokens + 2;
        let (ld, ld_out) = (whole.packed(), heads * head_dim);
        let mut caches =
            [vec![nan; batch * capacity * kv_heads * head_dim], vec![nan; batch * capacity * kv_heads * head_dim]];
        let mut all = vec![nan; batch * tokens * ld_out];
        let crew = Crew::new(threads).unwrap();
        let mut start = 0;
        for &end in cuts {
            let new = end - start;
            let shape = CachedAttentionShape { batch, tokens: new, capacity, heads, kv_heads, head_dim, scale };
            let part: Vec<T> = (0..batch).flat_map(|b| qkv[(b * tokens + start) * ld..][..new * ld].to_vec()).collect();
            let mut out = vec![nan; batch * new * ld_out];
            let mut space = vec![f32::NAN; attention_cached_workspace(&shape, threads)];
            let [k, v] = &mut caches;
            crew.lead(|| attention_cached(&shape, &part, start, k, v, &mut out, &mut space)).unwrap();
            for b in 0..batch {
                all[(b * tokens + start) * ld_out..][..new * ld_out]
                    .copy_from_slice(&out[b * new * ld_out..][..new * ld_out]);
            }
            start = end;
        }
        all
    }

    fn same_bits_as_attention<T: Element + PartialEq + std::fmt::Debug>() {
        for [batch, tokens, heads, kv_heads, head_dim] in
            [[1, 1, 1, 1, 1], [2, 70, 4, 2, 16], [1, 150, 2, 1, 20], [2, 5, 3, 3, 64], [1, 200, 4, 4, 64]]
        {
            let scale = 1.5 / (head_dim as f32).sqrt();
            let shape = AttentionShape { batch, tokens, heads, kv_heads, head_dim, causal: true, scale };
            let qkv = values::<T>(batch * tokens * shape.packed(), 1);
            let mut want = vec![T::from_f32(f32::NAN); batch * tokens * heads * head_dim];
            let mut lse = vec![0.0; batch * heads * tokens];
            attention(&shape, &qkv, &mut want, &mut lse, &mut vec![0.0; attention_workspace(&shape, 1)]);
            let one_by_one: Vec<usize> = (1..=tokens).collect();
            let prompt_first: Vec<usize> = (tokens.div_ceil(3)..=tokens).collect();
            let uneven: Vec<usize> = (1..=tokens).filter(|t| t % 37 == 5 || t % 11 < 2 || *t == tokens).collect();
            for cuts in [&[tokens][..], &one_by_one, &prompt_first, &uneven] {
                for threads in [1, 3] {
                    assert_eq!(in_calls(&shape, &qkv, cuts, threads), want, "{shape:?} cut at {cuts:?}");
                }
            }
        }
    }

    #[test]
    fn f32_has_the_bits_of_the_whole_text() {
        same_bits_as_attention::<f32>();
    }

    #[test]
    fn bf16_has_the_bits_of_the_whole_text() {
        same_bits_as_attention::<bf16>();
    }

    #[test]
    fn a_full_cache_is_an_error_and_is_left_alone() {
        let shape =
            CachedAttentionShape { batch: 1, tokens: 2, capacity: 4, heads: 1, kv_heads: 1, head_dim: 2, scale: 1.0 };
        let (mut k, mut v, mut out) = (vec![7.0f32; 8], vec![8.0; 8], vec![9.0; 4]);
        let mut space = vec![0.0; attention_cached_workspace(&shape, 1)];
        for start in [3, 4, 5, usize::MAX] {
            let got = attention_cached(&shape, &[1.0; 12], start, &mut k, &mut v, &mut out, &mut space);
            assert_eq!(got, Err(CacheFull { start, tokens: 2, capacity: 4 }));
        }
        assert!(k.iter().all(|&x| x == 7.0) && v.iter().all(|&x| x == 8.0) && out.iter().all(|&x| x == 9.0));
        attention_cached(&shape, &[1.0; 12], 2, &mut k, &mut v, &mut out, &mut space).unwrap();
        assert_eq!(k, [7.0, 7.0, 7.0, 7.0, 1.0, 1.0, 1.0, 1.0]);
    }
}
