//! The MoE layer, forward and backward: cost grows with tokens, not with experts.
//!
//! `cargo bench -p moebius-benches --bench layer`. Throughput is in floating-point operations of the matrix products
//! (top-1: 6 * 2 * tokens * width * ffn for forward and backward), to be held against the FMA peak that `kernels` prints.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moebius_benches::ready_layer;

const WIDTH: usize = 256;
const FFN: usize = 1024;

fn experts(c: &mut Criterion) {
    let mut group = c.benchmark_group("moe layer, 16384 tokens, forward and backward");
    group.sample_size(10);
    let tokens = 16_384;
    group.throughput(Throughput::Elements((12 * tokens * WIDTH * FFN) as u64));
    for experts in [8, 16, 32, 64] {
        let (mut session, mut program) = ready_layer(tokens, WIDTH, FFN, experts).expect("the layer compiles");
        group.bench_function(BenchmarkId::new("experts", experts), |b| {
            b.iter(|| session.run(&mut program).expect("the layer runs"));
        });
    }
    group.finish();
}

fn tokens(c: &mut Criterion) {
    let mut group = c.benchmark_group("moe layer, 16 experts, forward and backward");
    group.sample_size(10);
    for tokens in [64, 512, 4096] {
        group.throughput(Throughput::Elements((12 * tokens * WIDTH * FFN) as u64));
        let (mut session, mut program) = ready_layer(tokens, WIDTH, FFN, 16).expect("the layer compiles");
        group.bench_function(BenchmarkId::new("tokens", tokens), |b| {
            b.iter(|| session.run(&mut program).expect("the layer runs"));
        });
    }
    group.finish();
}

criterion_group!(benches, experts, tokens);
criterion_main!(benches);
