//! Whole training steps: `cargo bench -p moebius-benches --bench step`. Throughput is in tokens.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use moebius_benches::ready_step;
use moebius_models::config::Config;

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("training step");
    group.sample_size(10);
    for name in ["tiny-pr-moe", "bench-cpu"] {
        let config = Config::preset(name).expect("a preset");
        let (mut session, mut trainer) = ready_step(&config).expect("the step compiles");
        group.throughput(Throughput::Elements(config.tokens_per_step()));
        group.bench_function(name, |b| b.iter(|| trainer.step(&mut session, 1e-5).expect("the step runs")));
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
