//! Tests of sharing out and of transposing.

use super::*;

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

#[test]
fn every_task_runs_once_with_its_own_scratch() {
    for threads in [1, 2, 5] {
        let mut workspace = vec![f32::NAN; workspace_of(threads, 33)];
        let mut counts = vec![0u32; 100];
        let shared = Shared::new(&mut counts);
        share_out(100, true, &mut workspace, 33, |i, scratch| {
            assert_eq!(scratch.len(), 33);
            scratch.fill(i as f32);
            // SAFETY: task i has element i.
            unsafe { shared.piece(i, 1)[0] += 1 };
            assert!(scratch.iter().all(|&x| x == i as f32));
        });
        assert!(counts.iter().all(|&c| c == 1));
    }
}

#[test]
fn transposing_pads_the_lanes_with_zeros() {
    for (rows, width) in [(1, 1), (16, 5), (17, 3), (64, 8), (63, 2), (32, 13)] {
        let src = values(rows * (width + 2), 1);
        let mut dst = vec![f32::NAN; width * TILE];
        transpose(rows, width, (&src, width + 2), &mut dst);
        for d in 0..width {
            for r in 0..lanes(rows) {
                assert_eq!(dst[d * TILE + r], if r < rows { src[r * (width + 2) + d] } else { 0.0 });
            }
        }
    }
}
