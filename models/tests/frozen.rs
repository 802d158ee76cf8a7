//! A model that is not trained any more is kept in the dtype it computes in, and says the same.

use moebius::ir::DType;
use moebius::{Engine, Session};
use moebius_models::config::Config;
use moebius_models::generate::Generator;
use moebius_models::gpt;
use moebius_models::routes::RouteTap;

fn model(dtype: &str) -> Config {
    let mut config = Config::preset("tiny-pr-moe").unwrap();
    let settings = [("model.dtype", dtype), ("model.layers", "2"), ("model.experts", "[4]"), ("model.sequence", "64")];
    for (key, value) in settings {
        config.set(&format!("{key}={value}")).unwrap();
    }
    config
}

/// Logits after a text that is longer than a chunk of prefill.
fn logits(session: &mut Session, generator: &mut Generator) -> Vec<u32> {
    let text: Vec<i32> = (0..40).map(|i| i * 37 % 256).collect();
    generator.take(session, &text).unwrap().iter().map(|x| x.to_bits()).collect()
}

#[test]
fn frozen_and_trained_weights_give_the_same_bits() {
    for (dtype, stored) in [("bf16", DType::Bf16), ("f32", DType::F32)] {
        let config = model(dtype);
        let engine = Engine::open("cpu").unwrap();
        let mut trained = engine.session();
        let mut generator = Generator::new(&mut trained, &config.model).unwrap();
        gpt::initialise(&config.model, 5, |p, values| trained.write(&p.name, values)).unwrap();
        let wanted = logits(&mut trained, &mut generator);

        let mut frozen = engine.session();
        let mut generator = Generator::frozen(&mut frozen, &config.model, RouteTap::default()).unwrap();
        gpt::initialise(&config.model, 5, |p, values| frozen.write_rounded(&p.name, values)).unwrap();
        assert_eq!(logits(&mut frozen, &mut generator), wanted, "{dtype}");
        let dtype_of = |name: &str| frozen.ty(name).unwrap().dtype;
        assert_eq!(dtype_of("embedding.weight"), stored);
        assert!(frozen.names().iter().filter(|n| n.contains("experts")).all(|n| dtype_of(n) == stored));
        // The router computes in f32.
        assert_eq!(dtype_of("layers.1.moe.router.weight"), DType::F32);
    }
}
