//! Generation, one token at a time with a key/value cache: `cargo bench -p moebius-benches --bench decode`. Throughput is
//! in bytes of active weights, to be held against the read bandwidth that `kernels` prints.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use moebius::Engine;
use moebius_models::config::Config;
use moebius_models::generate::Generator;
use moebius_models::gpt;

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    let config = Config::preset("bench-cpu").expect("a preset");
    let mut session = Engine::cpu(None).expect("the CPU").session();
    let mut generator = Generator::new(&mut session, &config.model).expect("the step compiles");
    gpt::initialise(&config.model, 0, |p, values| session.write(&p.name, values)).expect("weights");
    group.throughput(Throughput::Bytes(4 * config.parameters().active));
    let mut token = 0;
    group.bench_function("bench-cpu", |b| {
        b.iter(|| {
            token = (token + 1) % 256;
            generator.take(&mut session, &[token]).expect("the step runs").len()
        });
    });
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
