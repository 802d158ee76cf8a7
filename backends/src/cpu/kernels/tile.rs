//! What the attention and loss kernels share: loading tiles as f32, and sharing tasks out over threads with a piece of
//! workspace each.
//!
//! Tiles are laid out so that the vector lanes run over rows of the result (queries, tokens), which need no sum across
//! lanes: a softmax over keys or vocabulary is then plain elementwise work.

use std::any::TypeId;

use crate::cpu::crew::share;
use crate::cpu::element::Element;
use crate::cpu::kernels::product::transpose_squares;

/// Rows of a tile in either direction. 64 x 64 floats are 16 KiB: the tiles of one product fit the L2 cache with room.
pub(super) const TILE: usize = 64;
/// Lane counts are multiples of this (one AVX-512 register).
pub(super) const LANES: usize = 16;

/// `n` rounded up to whole registers.
pub(super) const fn lanes(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// The elements as f32 without a copy, if they are f32.
#[inline(always)]
pub(super) fn as_f32<T: Element>(elements: &[T]) -> Option<&[f32]> {
    (TypeId::of::<T>() == TypeId::of::<f32>()).then(|| bytemuck::cast_slice(elements))
}

/// Copies `rows` rows of `width` elements, `ld_in` apart, to f32 rows `ld_out` apart.
#[inline(always)]
pub(super) fn load_rows<T: Element>(
    rows: usize,
    width: usize,
    (src, ld_in): (&[T], usize),
    scale: f32,
    (dst, ld_out): (&mut [f32], usize),
) {
    for r in 0..rows {
        let from = &src[r * ld_in..][..width];
        let to = &mut dst[r * ld_out..][..width];
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32() * scale;
        }
    }
}

/// Copies `rows` (at most [`TILE`]) rows of `width` f32, `ld_in` apart, to the lanes of `dst` [width, TILE]: element
/// (r, d) goes to d * TILE + r. Lanes from `rows` up to the next multiple of [`LANES`] become 0.
#[inline(always)]
pub(super) fn transpose(rows: usize, width: usize, (src, ld_in): (&[f32], usize), dst: &mut [f32]) {
    let full = rows / LANES * LANES;
    let square = transpose_squares([full, width], (src, ld_in), (&mut *dst, TILE));
    for r in (0..full).step_by(LANES) {
        let from: [&[f32]; LANES] = std::array::from_fn(|x| &src[(r + x) * ld_in..][..width]);
        for d in square..width {
            let to = &mut dst[d * TILE + r..][..LANES];
            for x in 0..LANES {
                to[x] = from[x][d];
            }
        }
    }
    if full < rows {
        for d in 0..width {
            let to = &mut dst[d * TILE + full..][..LANES];
            for x in 0..LANES {
                to[x] = if full + x < rows { src[(full + x) * ld_in + d] } else { 0.0 };
            }
        }
    }
}

/// A slice that several tasks write, each its own elements.
#[derive(Clone, Copy)]
pub(super) struct Shared<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: it hands out pieces only through `piece`, whose callers promise that no two tasks have the same elements.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Shares `data` out; it must outlive every piece.
    pub(super) fn new(data: &mut [T]) -> Self {
        Shared { data: data.as_mut_ptr(), len: data.len() }
    }

    /// Elements [start, start + len).
    ///
    /// # Safety
    /// The slice is still borrowed by the kernel, and no other live piece, in any task, overlaps this one.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // Disjointness is the callers' promise.
    pub(super) unsafe fn piece(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: in bounds, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// The workspace of `threads` threads with `per_thread` f32 each, with room to align each part to a cache line.
pub(super) const fn workspace_of(threads: usize, per_thread: usize) -> usize {
    let threads = if threads == 0 { 1 } else { threads };
    threads * (lanes(per_thread) + LANES)
}

/// Runs `task(i, scratch)` for i in 0..tasks, on as many threads as `workspace` has parts for ([`workspace_of`]), or on
/// the calling one if `parallel` is false. Tasks go to whichever thread is free, so each must write its own output.
///
/// # Panics
/// If `workspace` has no room for one thread (a bug of the caller).
pub(super) fn share_out(
    tasks: usize,
    parallel: bool,
    workspace: &mut [f32],
    per_thread: usize,
    task: impl Fn(usize, &mut [f32]) + Sync,
) {
    let part = workspace_of(1, per_thread);
    assert!(workspace.len() >= part, "a workspace of {} f32 where {part} are needed", workspace.len());
    let aligned = |scratch: &mut [f32]| -> usize { scratch.as_ptr().align_offset(64).min(LANES) };
    if !parallel || tasks <= 1 || workspace.len() < 2 * part {
        let skip = aligned(workspace);
        for i in 0..tasks {
            task(i, &mut workspace[skip..skip + per_thread]);
        }
        return;
    }
    let scratch = Shared::new(workspace);
    share(scratch.len / part, tasks, |worker, i| {
        // SAFETY: each worker has its own part, which `share` gives to no other thread meanwhile.
        let scratch = unsafe { scratch.piece(worker * part, part) };
        let skip = aligned(scratch);
        task(i, &mut scratch[skip..skip + per_thread]);
    });
}

/// Cuts the first `n` elements off `scratch`.
pub(super) fn cut<'a>(scratch: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(scratch).split_at_mut(n);
    *scratch = tail;
    head
}

#[cfg(test)]
#[path = "tile_tests.rs"]
mod tests;
