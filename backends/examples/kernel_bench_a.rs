//! Times the attention, normalisation and loss kernels: `cargo run --release -p moebius-backends --example kernel_bench_a`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use half::bf16;
use moebius_backends::cpu::element::Element;
use moebius_backends::cpu::kernels::attention::{
    AttentionShape, attention, attention_grad, attention_grad_workspace, attention_workspace,
};
use moebius_backends::cpu::kernels::attention_cached::{
    CachedAttentionShape, attention_cached, attention_cached_workspace,
};
use moebius_backends::cpu::kernels::layer_norm::{layer_norm, layer_norm_grad, layer_norm_grad_workspace};
use moebius_backends::cpu::kernels::linear_cross_entropy::{
    LinearCrossEntropyShape, linear_cross_entropy, linear_cross_entropy_grad, linear_cross_entropy_grad_workspace,
    linear_cross_entropy_workspace,
};
use moebius_backends::cpu::kernels::rms_norm::{rms_norm, rms_norm_grad, rms_norm_grad_workspace};
use moebius_backends::cpu::kernels::softmax::{softmax, softmax_grad};

/// The best of `runs` in milliseconds, after one to warm up.
fn best(runs: usize, mut f: impl FnMut()) -> f64 {
    f();
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64() * 1e3
        })
        .fold(f64::INFINITY, f64::min)
}

fn values(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

fn typed<T: Element>(n: usize) -> Vec<T> {
    values(n).into_iter().map(T::from_f32).collect()
}

fn attention_case(batch: usize, tokens: usize, heads: usize, kv_heads: usize, head_dim: usize, threads: usize) {
    let shape = AttentionShape {
        batch,
        tokens,
        heads,
        kv_heads,
        head_dim,
        causal: true,
        scale: 1.0 / (head_dim as f32).sqrt(),
    };
    let qkv = values(batch * tokens * shape.packed());
    let mut out = vec![0.0; batch * tokens * heads * head_dim];
    let mut lse = vec![0.0; batch * heads * tokens];
    let dout = values(out.len());
    let mut dqkv = vec![0.0; qkv.len()];
    let mut space = vec![0.0; attention_workspace(&shape, threads)];
    let forward = best(20, || attention(&shape, &qkv, &mut out, &mut lse, &mut space));
    let mut space = vec![0.0; attention_grad_workspace(&shape, threads)];
    let backward = best(20, || attention_grad(&shape, &qkv, &out, &lse, &dout, &mut dqkv, &mut space));
    // Multiply-adds of the visible half, two flops each: 2 products forward, 5 backward.
    let flops = (batch * heads * tokens * (tokens + 1) * head_dim) as f64;
    println!(
        "attention B={batch} T={tokens} H={heads} G={kv_heads} Dh={head_dim}: {forward:.2} ms ({:.0} GFLOP/s), \
         grad {backward:.2} ms ({:.0} GFLOP/s)",
        2.0 * flops / forward / 1e6,
        5.0 * flops / backward / 1e6
    );
}

/// One new token over `start` cached ones.
fn cached_case<T: Element>(start: usize, heads: usize, kv_heads: usize, head_dim: usize, threads: usize) {
    let capacity = start + 1;
    let shape = CachedAttentionShape { batch: 1, tokens: 1, capacity, heads, kv_heads, head_dim, scale: 0.125 };
    let qkv = typed::<T>((heads + 2 * kv_heads) * head_dim);
    let mut k = typed::<T>(capacity * kv_heads * head_dim);
    let mut v = k.clone();
    let mut out = typed::<T>(heads * head_dim);
    let mut space = vec![0.0; attention_cached_workspace(&shape, threads)];
    let time = best(200, || {
        attention_cached(&shape, &qkv, start, &mut k, &mut v, &mut out, &mut space).expect("the cache has room");
    });
    println!(
        "attention_cached T=1 after {start} H={heads} G={kv_heads} Dh={head_dim} {}: {:.1} us ({:.1} GB/s)",
        std::any::type_name::<T>(),
        time * 1e3,
        (2 * start * kv_heads * head_dim * size_of::<T>()) as f64 / time / 1e6
    );
}

fn loss_case<T: Element>(rows: usize, width: usize, vocabulary: usize, runs: usize, threads: usize) {
    let shape = LinearCrossEntropyShape { rows, width, vocabulary };
    let (x, w) = (typed::<T>(rows * width), typed::<T>(vocabulary * width));
    let targets: Vec<i32> = (0..rows).map(|r| (r * 7919 % vocabulary) as i32).collect();
    let (mut loss, mut lse, dloss) = (vec![0.0; rows], vec![0.0; rows], vec![1.0 / rows as f32; rows]);
    let (mut dx, mut dw) = (x.clone(), vec![0.0f32; w.len()]);
    let mut space = vec![0.0; linear_cross_entropy_workspace(&shape, threads)];
    let forward = best(runs, || {
        linear_cross_entropy(&shape, &x, &w, &targets, &mut loss, &mut lse, &mut space).expect("targets in range");
    });
    let mut space = vec![0.0; linear_cross_entropy_grad_workspace(&shape, threads)];
    let backward = best(runs, || {
        linear_cross_entropy_grad(&shape, &x, &w, &targets, &lse, &dloss, &mut dx, &mut dw, &mut space)
            .expect("targets in range");
    });
    let flops = 2.0 * (rows * width * vocabulary) as f64;
    println!(
        "linear_cross_entropy N={rows} D={width} V={vocabulary} {}: {forward:.2} ms ({:.0} GFLOP/s), \
         grad {backward:.2} ms ({:.0} GFLOP/s)",
        std::any::type_name::<T>(),
        flops / forward / 1e6,
        3.0 * flops / backward / 1e6
    );
}

/// Forward and vjp of the kernels over rows; the rate counts what each must read and write once.
fn row_cases<T: Element>(rows: usize, width: usize) {
    let (x, dy) = (typed::<T>(rows * width), typed::<T>(rows * width));
    let (mut y, mut dx) = (x.clone(), x.clone());
    let (gamma, beta) = (values(width), values(width));
    let (mut dgamma, mut dbeta) = (gamma.clone(), beta.clone());
    let (mut mean, mut rstd) = (vec![0.0; rows], vec![0.0; rows]);
    let mut space = vec![0.0; layer_norm_grad_workspace(rows, width).max(rms_norm_grad_workspace(rows, width))];
    let report = |name: &str, tensors: usize, time: f64| {
        let bytes = (tensors * rows * width * size_of::<T>()) as f64;
        println!(
            "{name} [{rows}, {width}] {}: {time:.3} ms ({:.1} GB/s)",
            std::any::type_name::<T>(),
            bytes / time / 1e6
        );
    };
    let time = best(50, || layer_norm(&x, &gamma, &beta, 1e-5, &mut y, &mut mean, &mut rstd));
    report("layer_norm", 2, time);
    let time = best(50, || {
        layer_norm_grad(&x, &gamma, &mean, &rstd, &dy, &mut dx, &mut dgamma, &mut dbeta, &mut space);
    });
    report("layer_norm_grad", 3, time);
    let time = best(50, || rms_norm(&x, &gamma, 1e-5, &mut y, &mut rstd));
    report("rms_norm", 2, time);
    let time = best(50, || rms_norm_grad(&x, &gamma, &rstd, &dy, &mut dx, &mut dgamma, &mut space));
    report("rms_norm_grad", 3, time);
    let time = best(50, || softmax(&x, width, &mut y));
    report("softmax", 2, time);
    let time = best(50, || softmax_grad(&y, &dy, width, &mut dx));
    report("softmax_grad", 3, time);
}

fn main() {
    let threads = rayon::current_num_threads();
    println!("{threads} threads");
    attention_case(8, 256, 4, 4, 64, threads);
    attention_case(8, 256, 4, 2, 64, threads);
    attention_case(8, 256, 8, 8, 32, threads);
    attention_case(1, 2048, 4, 4, 64, threads);
    for start in [16, 255, 2047] {
        cached_case::<f32>(start, 4, 4, 64, threads);
        cached_case::<bf16>(start, 4, 4, 64, threads);
    }
    cached_case::<f32>(2047, 16, 4, 128, threads);
    loss_case::<f32>(2048, 128, 256, 20, threads);
    loss_case::<f32>(2048, 256, 256, 20, threads);
    loss_case::<bf16>(2048, 256, 256, 20, threads);
    loss_case::<f32>(1024, 256, 50_304, 1, threads);
    row_cases::<f32>(2048, 256);
    row_cases::<bf16>(2048, 256);
}
