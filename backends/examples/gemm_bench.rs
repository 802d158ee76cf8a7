//! Our matmul beside the `gemm` crate, against the machine's measured FMA peak and read bandwidth.
//!
//! `cargo run --release -p moebius-backends --example gemm_bench [filter] [seconds per measurement]`
//!
//! Ours, theirs and the peak loop take turns, and the best time of each counts, so that a busy machine disturbs them
//! alike. "cold" shapes cycle through more weights than the caches hold.
#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use moebius_backends::cpu::gemm::{Batch, Gemm, Mat, MatMut, Storage, Stored, gemm, gemm_seq, workspace_bytes};

/// Best time of each of several closures that take turns for `seconds`, in seconds.
fn race(seconds: f64, runners: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; runners.len()];
    // Enough calls per sample that the clock's own cost vanishes.
    let mut calls = vec![1usize; runners.len()];
    for (run, calls) in runners.iter_mut().zip(&mut calls) {
        run();
        let start = Instant::now();
        run();
        *calls = (200e-6 / start.elapsed().as_secs_f64().max(1e-9)).clamp(1.0, 10_000.0) as usize;
    }
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    while Instant::now() < end {
        for ((run, best), &calls) in runners.iter_mut().zip(&mut best).zip(&calls) {
            let start = Instant::now();
            (0..calls).for_each(|_| run());
            *best = best.min(start.elapsed().as_secs_f64() / calls as f64);
        }
    }
    best
}

/// GFLOP/s of independent FMAs on every core at once.
fn fma_peak() -> f64 {
    const STEPS: usize = 200_000;
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn steps() -> f32 {
        use std::arch::x86_64::*;
        let mut acc: [__m512; 16] = std::array::from_fn(|i| _mm512_set1_ps(i as f32));
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        acc.into_iter().map(|acc| _mm512_reduce_add_ps(acc)).sum()
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        let threads = rayon::current_num_threads();
        let best = race(
            0.5,
            &mut [&mut || {
                // SAFETY: the feature was detected.
                rayon::broadcast(|_| black_box(unsafe { steps() }));
            }],
        );
        return (threads * STEPS * 16 * 16 * 2) as f64 / best[0] / 1e9;
    }
    f64::NAN
}

/// GB/s read by all cores from a buffer larger than the caches, a new slab of 4 MiB per sample.
fn read_bandwidth(big: &[u64]) -> f64 {
    const SLAB: usize = (4 << 20) / 8;
    let mut turn = 0;
    let best = race(
        1.0,
        &mut [&mut || {
            turn = (turn + 1) % (big.len() / SLAB);
            let slab = &big[turn * SLAB..][..SLAB];
            let part = SLAB / rayon::current_num_threads();
            rayon::broadcast(|thread| {
                let mut sums = [0u64; 32];
                for chunk in slab[thread.index() * part..][..part].chunks_exact(32) {
                    sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum ^= x);
                }
                black_box(sums)
            });
        }],
    );
    (SLAB * 8) as f64 / best[0] / 1e9
}

struct Bench {
    filter: String,
    seconds: f64,
    peak: f64,
    bandwidth: f64,
    big: Vec<u64>,
    workspace: Vec<u8>,
}

/// What a line of the table multiplies.
struct Shape {
    name: String,
    /// Per problem.
    m: usize,
    n: usize,
    k: usize,
    problems: usize,
    kind: Kind,
    /// B is [N,K].
    transposed: bool,
    /// Weights are read from memory, not from the caches.
    cold: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    Batched,
    MGrouped,
    KGrouped,
    Seq,
}

impl Bench {
    fn line<T: Stored>(&mut self, shape: &Shape) {
        let Shape { m, n, k, problems, kind, transposed, cold, .. } = *shape;
        let name = format!("{} {:?}", shape.name, T::STORAGE);
        if !name.contains(&self.filter) {
            return;
        }
        let values =
            |len: usize| -> Vec<T> { (0..len).map(|i| T::from_f32((i * 7 % 31) as f32 / 16.0 - 1.0)).collect() };
        let k_grouped = kind == Kind::KGrouped;
        let (a, b_size) = (values(problems * m * k), problems * k * n);
        let copies = if cold { (400 << 20) / (b_size * size_of::<T>()) + 1 } else { 1 };
        let b = values(b_size * copies);
        let mut c = values(problems * m * n);
        let mut theirs_c = c.clone();
        let offsets: Vec<i32> = (0..=problems).map(|e| (e * if k_grouped { k } else { m }) as i32).collect();
        let (b_row, b_col) = if transposed { (1, k) } else { (n, 1) };
        // When K-grouped A is the transpose of rows [S, M].
        let (a_row, a_col) = if k_grouped { (1, m) } else { (k, 1) };
        let need = workspace_bytes(m * problems, n, k * problems, T::STORAGE, rayon::current_num_threads());
        self.workspace.resize(need.max(self.workspace.len()), 0);
        let mut turn = 0;
        let workspace = &mut self.workspace;
        let mut ours = || {
            turn = (turn + 1) % copies;
            let a = Mat::new(a.as_ptr(), a_row as isize, a_col as isize);
            let b = Mat::new(b[turn * b_size..].as_ptr(), b_row as isize, b_col as isize);
            let c = MatMut::new(c.as_mut_ptr(), n as isize, 1);
            let one = Gemm::new(m, n, k, a, b, c);
            let whole = match kind {
                Kind::Plain | Kind::Seq => one,
                Kind::Batched => {
                    let steps = |step: usize| [0, step as isize];
                    let counts = [1, problems];
                    Gemm { batch: Batch::Strided { counts, a: steps(m * k), b: steps(k * n), c: steps(m * n) }, ..one }
                }
                Kind::MGrouped => {
                    let batch = Batch::MGrouped { offsets: &offsets, b: (k * n) as isize };
                    Gemm { m: m * problems, batch, ..one }
                }
                Kind::KGrouped => {
                    let batch = Batch::KGrouped { offsets: &offsets, c: (m * n) as isize };
                    Gemm { k: k * problems, batch, ..one }
                }
            };
            // SAFETY: the operands were made for these sizes.
            let done = unsafe { if kind == Kind::Seq { gemm_seq(&whole, workspace) } else { gemm(&whole, workspace) } };
            done.expect("a valid batch");
        };
        // Far from ours, whose weights are still in the cache.
        let mut their_turn = copies / 2;
        let mut theirs = || {
            their_turn = (their_turn + 1) % copies;
            for p in 0..problems {
                let parallel =
                    if kind == Kind::Seq { ::gemm::Parallelism::None } else { ::gemm::Parallelism::Rayon(0) };
                let a = a[p * m * k..].as_ptr().cast::<f32>();
                let b = b[their_turn * b_size + p * k * n..].as_ptr().cast::<f32>();
                let c = theirs_c[p * m * n..].as_mut_ptr().cast::<f32>();
                let (a_col, a_row) = (a_col as isize, a_row as isize);
                let (b_col, b_row) = (b_col as isize, b_row as isize);
                // SAFETY: only called for f32, with operands of these sizes.
                unsafe {
                    ::gemm::gemm(
                        m, n, k, c, 1, n as isize, false, a, a_col, a_row, b, b_col, b_row, 0.0, 1.0, false, false,
                        false, parallel,
                    );
                }
            }
        };
        let best = if T::STORAGE == Storage::F32 {
            race(self.seconds, &mut [&mut ours, &mut theirs])
        } else {
            race(self.seconds, &mut [&mut ours])
        };
        let flops = (2 * problems * m * n * k) as f64;
        let bytes = (b_size * size_of::<T>()) as f64;
        let rate = flops / best[0] / 1e9;
        let share =
            100.0 * rate / if kind == Kind::Seq { self.peak / rayon::current_num_threads() as f64 } else { self.peak };
        print!("{name:44} {:9.1} us {rate:7.1} GFLOP/s {share:5.1} % of FMA", best[0] * 1e6);
        if cold {
            let speed = bytes / best[0] / 1e9;
            print!("  {speed:5.1} GB/s {:5.1} % of memory", 100.0 * speed / self.bandwidth);
        }
        if let Some(theirs) = best.get(1) {
            print!("  gemm crate {:7.1} GFLOP/s, ours x{:.2}", flops / theirs / 1e9, theirs / best[0]);
        }
        println!();
    }

    fn peaks(&mut self) {
        self.peak = fma_peak();
        self.bandwidth = read_bandwidth(&self.big);
        println!(
            "FMA peak {:.1} GFLOP/s, read bandwidth {:.1} GB/s, {} threads, {}",
            self.peak,
            self.bandwidth,
            rayon::current_num_threads(),
            moebius_backends::cpu::gemm::instruction_set()
        );
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let filter = args.next().unwrap_or_default();
    let seconds = args.next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0.5);
    let big = vec![1u64; (512 << 20) / 8];
    let mut bench = Bench { filter, seconds, peak: 0.0, bandwidth: 0.0, big, workspace: Vec::new() };
    bench.peaks();
    let shape = |name: &str, m, n, k, problems, kind, transposed, cold| Shape {
        name: format!("{name} {problems}x[{m},{k}]x[{k},{n}]{}", if transposed { "^T" } else { "" }),
        m,
        n,
        k,
        problems,
        kind,
        transposed,
        cold,
    };
    use Kind::*;
    let shapes = [
        shape("train", 2048, 1024, 256, 1, Plain, false, false),
        shape("train", 2048, 256, 1024, 1, Plain, false, false),
        shape("train", 2048, 1024, 256, 1, Plain, true, false),
        shape("train", 2048, 256, 1024, 1, Plain, true, false),
        shape("experts", 256, 1024, 256, 8, MGrouped, false, false),
        shape("experts", 256, 256, 1024, 8, MGrouped, false, false),
        shape("experts", 256, 1024, 256, 8, MGrouped, true, false),
        shape("experts", 256, 1024, 256, 64, MGrouped, false, false),
        shape("wgrad", 256, 1024, 2048, 1, KGrouped, false, false),
        shape("wgrad", 256, 1024, 256, 8, KGrouped, false, false),
        shape("wgrad", 1024, 256, 256, 8, KGrouped, false, false),
        shape("few", 1, 1024, 256, 64, MGrouped, false, true),
        shape("few", 4, 1024, 256, 64, MGrouped, false, true),
        shape("few", 8, 1024, 256, 64, MGrouped, false, true),
        shape("few", 14, 1024, 256, 64, MGrouped, false, true),
        shape("few", 16, 1024, 256, 64, MGrouped, false, true),
        shape("few", 32, 1024, 256, 64, MGrouped, false, true),
        shape("few", 8, 1024, 256, 64, MGrouped, true, true),
        shape("few", 32, 1024, 256, 64, MGrouped, true, true),
        shape("decode", 1, 4096, 4096, 1, Plain, false, true),
        shape("decode", 1, 4096, 4096, 1, Plain, true, true),
        shape("decode", 4, 4096, 4096, 1, Plain, false, true),
        shape("decode", 4, 4096, 4096, 1, Plain, true, true),
        shape("decode", 8, 4096, 4096, 1, Plain, false, true),
        shape("decode", 8, 4096, 4096, 1, Plain, true, true),
        shape("stream", 1, 2048, 512, 1, Plain, false, true),
        shape("stream", 1, 512, 2048, 1, Plain, true, true),
        shape("stream", 8, 2048, 512, 1, Plain, false, true),
        shape("stream", 8, 512, 2048, 1, Plain, true, true),
        shape("hot", 1, 1024, 256, 1, Plain, false, false),
        shape("hot", 1, 256, 1024, 1, Plain, true, false),
        shape("small", 1, 256, 256, 1, Plain, false, false),
        shape("small", 1, 256, 256, 1, Plain, true, false),
        shape("small", 1, 16, 256, 1, Plain, false, false),
        shape("heads", 64, 64, 64, 64, Batched, false, false),
        shape("heads", 64, 64, 64, 64, Batched, true, false),
        shape("tile", 64, 64, 64, 1, Seq, false, false),
        shape("tile", 64, 64, 64, 1, Seq, true, false),
        shape("square", 1024, 1024, 1024, 1, Plain, false, false),
        shape("odd", 1000, 1003, 517, 1, Plain, false, false),
        shape("vocab", 512, 50257, 256, 1, Plain, true, false),
    ];
    for shape in &shapes {
        bench.line::<f32>(shape);
        bench.line::<bf16>(shape);
    }
    bench.peaks();
}
