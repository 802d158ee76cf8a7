//! A model that is not trained any more is kept in the dtype it computes in, and says the same.

use moebius::ir::DType;
use moebius::{Engine, Session};
use moebius_models::config::Config;
use moebius_models::generate::Generator;
use moebius_models::gpt;
use moebius_models::routes::RouteTap;
use moebius_models::sampling::most_likely;

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

/// A device that chooses its tokens itself chooses those of the host, from any place of a text, also where the sequence is full, and
/// among as many tokens as it is told.
#[test]
fn tokens_that_the_device_chooses_are_those_of_the_host() {
    for dtype in ["f32", "bf16"] {
        let config = model(dtype);
        let engine = Engine::open("cpu").unwrap();
        let mut session = engine.session();
        let mut generator = Generator::frozen(&mut session, &config.model, RouteTap::default()).unwrap();
        gpt::initialise(&config.model, 5, |p, values| {
            // Positions that count, so that the text is not one token again and again.
            let size = if p.name == "position.weight" { 40.0 } else { 1.0 };
            session.write_rounded(&p.name, &values.iter().map(|x| size * x).collect::<Vec<_>>())
        })
        .unwrap();
        let prompt: Vec<i32> = (0..37).map(|i| i * 41 % 256).collect();
        for known in [256, 251, 3] {
            let mut by_host = Vec::new();
            let mut logits = generator.take(&mut session, &prompt).unwrap();
            let first = most_likely(&logits[..known]) as i32;
            let mut next = first;
            for _ in 0..90 {
                logits = generator.take(&mut session, &[next]).unwrap();
                next = most_likely(&logits[..known]) as i32;
                by_host.push(next);
            }
            generator.reset();
            generator.take(&mut session, &prompt).unwrap();
            // In portions, and the host's way in between.
            let mut by_device = generator.follow(&mut session, first, known, 20).unwrap();
            let logits = generator.take(&mut session, &by_device[19..]).unwrap();
            by_device.push(most_likely(&logits[..known]) as i32);
            by_device.extend(generator.follow(&mut session, by_device[20], known, 69).unwrap());
            assert_eq!(by_device, by_host, "{dtype}, {known} tokens");
            assert!(by_device.iter().collect::<std::collections::HashSet<_>>().len() > 2, "{by_device:?}");
            generator.reset();
        }
        // Not a number is told with its place, and nothing is chosen.
        session.write_rounded("norm.weight", &vec![f32::NAN; config.model.width]).unwrap();
        let told = generator.follow(&mut session, 1, 256, 5).unwrap_err().to_string();
        assert!(told.contains("after token 0 of the text"), "{told}");
    }
}
