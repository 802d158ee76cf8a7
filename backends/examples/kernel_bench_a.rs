//! Times the attention, normalisation and loss kernels: `cargo run --release -p moebius-backends --example kernel_bench_a`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use moebius_backends::cpu::kernels::attention::{
    AttentionShape, attention, attention_grad, attention_grad_workspace, attention_workspace,
};

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

fn main() {
    let threads = rayon::current_num_threads();
    println!("{threads} threads");
    attention_case(8, 256, 4, 4, 64, threads);
    attention_case(8, 256, 4, 2, 64, threads);
    attention_case(8, 256, 8, 8, 32, threads);
    attention_case(1, 2048, 4, 4, 64, threads);
}
