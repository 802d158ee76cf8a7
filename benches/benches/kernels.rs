//! Single ops against what the machine can do: `cargo bench -p moebius-benches --bench kernels`.
//!
//! First it prints the FMA peak and the read bandwidth of all cores. Products and attention are then counted in
//! floating-point operations a second (criterion's `elem/s`), ops that stream through memory in bytes a second. An op is
//! run as in a model: compiled from a graph, on all threads. `-- NAME` runs the cases with NAME in theirs.

#![allow(clippy::print_stdout)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moebius::ir::{DType, Graph, Result, TensorType, Value};
use moebius_benches::{Ids, peaks, ready_op};

fn feed(g: &mut Graph, name: &str, dtype: DType, shape: &[usize]) -> Result<Value> {
    g.feed(name, TensorType::new(dtype, shape))
}

/// Measures the op that `build` makes; it returns the results and the values of integer feeds.
fn case(
    c: &mut Criterion,
    group: &str,
    name: String,
    work: Throughput,
    build: impl FnOnce(&mut Graph) -> Result<(Vec<Value>, Ids)>,
) {
    let (mut session, mut program) = ready_op(build).expect("the op compiles");
    let mut group = c.benchmark_group(group);
    group.sample_size(10).throughput(work);
    group.bench_function(BenchmarkId::from_parameter(name), |b| {
        b.iter(|| session.run(&mut program).expect("the op runs"));
    });
    group.finish();
}

#[expect(clippy::print_stdout, reason = "the rates that the figures after it are read against")]
fn print_peaks(_: &mut Criterion) {
    println!("FMA peak {:.1} GFLOP/s, read bandwidth {:.1} GB/s", peaks::fma() / 1e9, peaks::read_bandwidth() / 1e9);
}

/// `[m,k] x [k,n]`: shapes of training, of the vocabulary, and of decoding, where the weights are read from memory.
fn matmul(c: &mut Criterion) {
    for dtype in [DType::F32, DType::Bf16] {
        for (m, n, k, transposed) in [
            (2048, 1024, 256, false),
            (2048, 256, 1024, false),
            (2048, 1024, 256, true),
            (1024, 1024, 1024, false),
            (1000, 1003, 517, false),
            (1, 4096, 4096, false),
            (1, 4096, 4096, true),
            (8, 4096, 4096, false),
        ] {
            let name = format!("{dtype} [{m},{k}]x[{k},{n}]{}", if transposed { "^T" } else { "" });
            let flops = Throughput::Elements((2 * m * n * k) as u64);
            let bytes = Throughput::Bytes((n * k * dtype.bytes()) as u64);
            case(c, "matmul", name, if m < 8 { bytes } else { flops }, |g| {
                let a = feed(g, "a", dtype, &[m, k])?;
                let b = feed(g, "b", dtype, &if transposed { [n, k] } else { [k, n] })?;
                Ok((vec![g.matmul_with(a, b, None, false, transposed)?], vec![]))
            });
        }
    }
}

/// Products by expert, with the same number of rows for each; few rows are a test of how fast weights are read.
fn experts(c: &mut Criterion) {
    let (d, h) = (256, 1024);
    for (experts, rows) in [(8, 256), (64, 256), (64, 32), (64, 4)] {
        let s = experts * rows;
        let flops = Throughput::Elements((2 * s * d * h) as u64);
        let offsets = || (0..=experts).map(|e| (e * rows) as i32).collect::<Vec<_>>();
        for transposed in [false, true] {
            let name = format!("{experts}x[{rows},{d}]x[{d},{h}]{}", if transposed { "^T" } else { "" });
            case(c, "expert_matmul", name, flops.clone(), |g| {
                let x = feed(g, "x", DType::F32, &[s, d])?;
                let w = feed(g, "w", DType::F32, &if transposed { [experts, h, d] } else { [experts, d, h] })?;
                let o = feed(g, "offsets", DType::I32, &[experts + 1])?;
                Ok((vec![g.expert_matmul(x, w, o, None, transposed)?], vec![("offsets", offsets())]))
            });
        }
        case(c, "expert_matmul_wgrad", format!("{experts}x[{rows},{d}]^Tx[{rows},{h}]"), flops, |g| {
            let (x, dy) = (feed(g, "x", DType::F32, &[s, d])?, feed(g, "dy", DType::F32, &[s, h])?);
            let o = feed(g, "offsets", DType::I32, &[experts + 1])?;
            Ok((vec![g.expert_matmul_wgrad(x, dy, o)?], vec![("offsets", offsets())]))
        });
    }
}

fn attention(c: &mut Criterion) {
    for (b, t, heads, kv, dim) in [(8, 256, 4, 4, 64), (8, 256, 4, 2, 64), (8, 256, 8, 8, 32), (1, 2048, 4, 4, 64)] {
        let name = format!("B={b} T={t} H={heads} G={kv} Dh={dim}");
        // Multiply-adds of the visible half, two operations each: 2 products forward, 5 backward.
        let half = (b * heads * t * (t + 1) * dim) as u64;
        let scale = 1.0 / (dim as f32).sqrt();
        let packed = [b, t, (heads + 2 * kv) * dim];
        case(c, "attention", name.clone(), Throughput::Elements(2 * half), |g| {
            let qkv = feed(g, "qkv", DType::F32, &packed)?;
            Ok((vec![g.attention(qkv, heads, kv, true, scale)?], vec![]))
        });
        case(c, "attention_grad", name, Throughput::Elements(5 * half), |g| {
            let qkv = feed(g, "qkv", DType::F32, &packed)?;
            let (out, lse) =
                (feed(g, "out", DType::F32, &[b, t, heads * dim])?, feed(g, "lse", DType::F32, &[b, heads, t])?);
            let dout = feed(g, "dout", DType::F32, &[b, t, heads * dim])?;
            Ok((vec![g.attention_grad(qkv, out, lse, dout, heads, kv, true, scale)?], vec![]))
        });
    }
}

fn cross_entropy(c: &mut Criterion) {
    for (n, d, v) in [(2048, 256, 256), (1024, 256, 50_304)] {
        let flops = (2 * n * d * v) as u64;
        let targets = || vec![("targets", (0..n).map(|i| (i * 7919 % v) as i32).collect())];
        let name = format!("[{n},{d}]x[{v},{d}]^T");
        case(c, "linear_cross_entropy", name.clone(), Throughput::Elements(flops), |g| {
            let (x, w) = (feed(g, "x", DType::F32, &[n, d])?, feed(g, "w", DType::F32, &[v, d])?);
            let t = feed(g, "targets", DType::I32, &[n])?;
            Ok((vec![g.linear_cross_entropy(x, w, t)?], targets()))
        });
        case(c, "linear_cross_entropy_grad", name, Throughput::Elements(3 * flops), |g| {
            let (x, w) = (feed(g, "x", DType::F32, &[n, d])?, feed(g, "w", DType::F32, &[v, d])?);
            let t = feed(g, "targets", DType::I32, &[n])?;
            let (lse, dloss) = (feed(g, "lse", DType::F32, &[n])?, feed(g, "dloss", DType::F32, &[n])?);
            Ok((g.linear_cross_entropy_grad(x, w, t, lse, dloss)?.to_vec(), targets()))
        });
    }
}

/// Ops over rows; the bytes are what each must read and write once.
fn rows(c: &mut Criterion) {
    let (n, d) = (2048, 256);
    for dtype in [DType::F32, DType::Bf16] {
        let bytes = |tensors: usize| Throughput::Bytes((tensors * n * d * dtype.bytes()) as u64);
        let name = || format!("{dtype} [{n},{d}]");
        let x = |g: &mut Graph, name: &str| feed(g, name, dtype, &[n, d]);
        let vector = |g: &mut Graph, name: &str, len: usize| feed(g, name, DType::F32, &[len]);
        case(c, "layer_norm", name(), bytes(2), |g| {
            let (x, gamma, beta) = (x(g, "x")?, vector(g, "gamma", d)?, vector(g, "beta", d)?);
            Ok((vec![g.layer_norm(x, gamma, beta, 1e-5)?], vec![]))
        });
        case(c, "layer_norm_grad", name(), bytes(3), |g| {
            let (a, gamma, dy) = (x(g, "x")?, vector(g, "gamma", d)?, x(g, "dy")?);
            let (mean, rstd) = (vector(g, "mean", n)?, vector(g, "rstd", n)?);
            Ok((g.layer_norm_grad(a, gamma, mean, rstd, dy)?.to_vec(), vec![]))
        });
        case(c, "rms_norm", name(), bytes(2), |g| {
            let (x, gamma) = (x(g, "x")?, vector(g, "gamma", d)?);
            Ok((vec![g.rms_norm(x, gamma, 1e-5)?], vec![]))
        });
        case(c, "softmax", name(), bytes(2), |g| {
            let x = x(g, "x")?;
            Ok((vec![g.softmax(x)?], vec![]))
        });
        case(c, "softmax_grad", name(), bytes(3), |g| {
            let (y, dy) = (x(g, "y")?, x(g, "dy")?);
            Ok((vec![g.softmax_grad(y, dy)?], vec![]))
        });
    }
}

criterion_group!(benches, print_peaks, matmul, experts, attention, cross_entropy, rows);
criterion_main!(benches);
