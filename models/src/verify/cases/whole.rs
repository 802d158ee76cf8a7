//! Whole layers as cases: sparse and residual layers built by hand, a small decoder, and the layer of the models with every
//! published router.

use moebius_ir::{DType, Graph, Result, Role, TensorType, Value};

use super::{Case, Edges, FLOATS, case};
use crate::config::{ComputeDtype, Config, ConfigError, Family, ModelConfig};
use crate::gpt::router::RouterNoise;
use crate::gpt::{Parameters, Pass, moe_layer};
use crate::verify::layers::{self, Moe};
use crate::verify::sketch::Sketch;
use crate::verify::tolerance::Class;

/// The kinds of layers, as [`Case::op`] names them.
pub const LAYERS: [&str; 4] = ["moe_layer", "residual_moe_layer", "decoder", "published_routers"];

/// The dtypes that models compute in.
const COMPUTE: &[DType] = &[DType::F32, DType::Bf16];

/// Tokens of the published routers' layer, as batch and sequence; its experts and width.
const BATCH: usize = 2;
const SEQUENCE: usize = 6;
const EXPERTS: usize = 16;
const WIDTH: usize = 8;
/// The layer's index over all layers, from 0.
const LAYER: usize = 1;

/// The numbers of the layers are near 1; of the router's gradient little may be left.
const TERMS: f64 = 0.1;

const MOE: Moe = Moe { width: 6, hidden: 8, experts: 5, k: 2, capacity: None, renormalise: true };

fn ways() -> Vec<(&'static str, Moe)> {
    vec![
        ("top-1", Moe { k: 1, renormalise: false, ..MOE }),
        ("top-1 with capacity", Moe { k: 1, renormalise: false, capacity: Some(2), ..MOE }),
        ("top-2", MOE),
        ("top-2 with capacity", Moe { capacity: Some(3), ..MOE }),
        ("top-3 of bare gates", Moe { k: 3, renormalise: false, ..MOE }),
        ("k = e", Moe { k: 5, ..MOE }),
        ("one expert", Moe { k: 1, experts: 1, ..MOE }),
        ("more experts than tokens", Moe { experts: 33, width: 20, hidden: 17, ..MOE }),
    ]
}

fn by_hand() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, layer) in ways() {
        for residual in [false, true] {
            let kind = if residual { "residual_moe_layer" } else { "moe_layer" };
            let of_layer = case(kind, what, Class::Layer, FLOATS, move |s| {
                s.direct = false;
                let x = s.float([11, layer.width], |x| x)?;
                let result = if residual {
                    layers::residual_moe(s, "layer", x, layer, None)?
                } else {
                    layers::moe(s, "layer", x, layer)?
                };
                [result.y, result.load_balancing_loss, result.z_loss].into_iter().try_for_each(|v| s.out(v))
            });
            cases.push(of_layer.drawn(Edges::Drawn).of_terms(0.0, TERMS));
        }
    }
    let decoder = case("decoder", "two blocks, tied embedding, all losses", Class::Layer, FLOATS, |s| {
        s.direct = false;
        let loss = layers::transformer(s, 2, 5, 13, Moe { width: 8, ..MOE })?;
        s.out(loss)
    });
    cases.push(decoder.drawn(Edges::DrawnFarOff).of_terms(0.0, TERMS));
    cases
}

/// A model whose layer [`LAYER`] routes as `family` does.
fn config(family: Family, capacity: Option<f64>, change: &str) -> Result<ModelConfig, ConfigError> {
    let mut config = Config::preset("tiny-pr-moe")?;
    for setting in [
        "model.layers=2".into(),
        format!("model.experts=[{EXPERTS}]"),
        format!("model.width={WIDTH}"),
        "model.ffn=6".into(),
        format!("model.sequence={SEQUENCE}"),
        "model.mlp=standard".into(),
        "model.min_capacity=1".into(),
        format!("model.router.preset={family}"),
    ] {
        config.set(&setting)?;
    }
    // Choices as in the family's published model.
    config.model.top_k = None;
    config.model.capacity_factor = capacity;
    if !change.is_empty() {
        config.set(change)?;
    }
    config.validate()?;
    Ok(config.model)
}

/// Values for the inputs that the layer made itself: parameters of a size that keeps its numbers near 1, and the selection
/// bias.
fn fill(s: &mut Sketch) {
    let open: Vec<(String, Value)> =
        s.graph.inputs().iter().filter(|(name, _)| !s.inputs.contains_key(name)).cloned().collect();
    for (name, value) in open {
        let ty = s.graph.ty(value).clone();
        let parameter = s.graph.input_of(value).is_some_and(|i| i.role == Role::Parameter);
        let size = match (parameter, name.ends_with(".bias")) {
            (true, false) => 1.5 / (WIDTH as f64).sqrt(),
            (true, true) | (false, _) => 0.1,
        };
        let data = s.normals(ty.elements()).into_iter().map(|x| size * x).collect();
        s.give(&name, value, data, parameter);
    }
}

fn of_models(s: &mut Sketch, config: &ModelConfig) -> Result<()> {
    s.direct = false;
    let x = s.float([BATCH, SEQUENCE, config.width], |x| x)?;
    let ids: Vec<i32> = (0..BATCH * SEQUENCE).map(|t| (t * 37 % config.vocab) as i32).collect();
    let ids = s.ints([BATCH, SEQUENCE], &ids)?;
    let noise = if config.routing().is_noisy() {
        let key = s.fixed(TensorType::new(DType::U32, [2]), vec![3.0, 4_294_967_295.0])?;
        RouterNoise::drawn(key, LAYER)
    } else {
        RouterNoise::default()
    };
    let pass = Pass { training: true, noise, used: None, ids: Some(ids), choices: None };
    let mut parameters = Parameters::new(config);
    let g: &mut Graph = &mut s.graph;
    let (y, statistics) = moe_layer(g, &mut parameters, LAYER, EXPERTS, x, &pass)?;
    fill(s);
    [y, statistics.load_balancing_loss, statistics.z_loss].into_iter().try_for_each(|v| s.out(v))?;
    [statistics.counts, statistics.dropped].into_iter().try_for_each(|v| s.aux(v))
}

fn published() -> Result<Vec<Case>, ConfigError> {
    let mut ways = Vec::new();
    for family in Family::ALL {
        if family != Family::ExpertChoice {
            ways.push((format!("{family}, dropless"), config(family, None, "")?));
        }
        ways.push((format!("{family}, with capacity"), config(family, Some(1.0), "")?));
    }
    let residual = config(Family::Top1, Some(1.0), "model.mlp=residual")?;
    ways.push(("top1, residual, with capacity".into(), residual));
    let by_score = config(Family::DeepseekV4, None, "model.router.hash_layers=0")?;
    ways.push(("deepseek-v4, after its layers by token id".into(), by_score));
    let of = |(name, config): (String, ModelConfig)| {
        case("published_routers", name, Class::Layer, COMPUTE, move |s| {
            let dtype = if s.dtype == DType::Bf16 { ComputeDtype::Bf16 } else { ComputeDtype::F32 };
            of_models(s, &ModelConfig { dtype, ..config.clone() })
        })
        .drawn(Edges::Drawn)
        .of_terms(0.0, TERMS)
    };
    Ok(ways.into_iter().map(of).collect())
}

/// The cases of whole layers.
///
/// # Errors
/// None but for a bug: a configuration that these cases make is refused.
pub fn layers() -> Result<Vec<Case>, ConfigError> {
    let mut cases = by_hand();
    cases.extend(published()?);
    Ok(cases)
}
