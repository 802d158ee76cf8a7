//! Start values, after the specification (2.1, 2.5), drawn by the counter-based generator: a tensor's values depend on
//! the seed and its place in the list only, so every backend and every machine starts from the same bits.

use moebius_ir::philox;

use super::parameters::Parameter;
use crate::config::ModelConfig;

/// The distribution a parameter starts from.
#[derive(Clone, Debug, PartialEq)]
pub enum Start {
    /// All zero.
    Zero,
    /// All one.
    One,
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in `[-bound, bound)`.
    Uniform {
        /// The bound.
        bound: f64,
    },
    /// Repeats of one normal draw that several parameters share: DeepSpeed's experts are copies of one module.
    Shared {
        /// Name of the draw.
        source: String,
        /// Its length; the parameter holds it as often as it fits.
        elements: usize,
        /// Standard deviation.
        std: f64,
    },
}

/// Calls `set` with each parameter and its start values, one at a time.
///
/// # Errors
/// Whatever `set` returns.
pub fn initialise<E>(
    config: &ModelConfig,
    seed: u64,
    mut set: impl FnMut(&Parameter, &[f32]) -> Result<(), E>,
) -> Result<(), E> {
    let key = [seed as u32, (seed >> 32) as u32];
    let list = Parameter::list(config);
    let mut values: Vec<f32> = Vec::new();
    for (index, parameter) in list.iter().enumerate() {
        let elements = parameter.shape.elements();
        let stream = index as u32;
        let normal = |stream: u32, std: f64, i: usize| (f64::from(philox::normal(key, stream, i as u64)) * std) as f32;
        values.clear();
        match &parameter.start {
            Start::Zero => values.resize(elements, 0.0),
            Start::One => values.resize(elements, 1.0),
            Start::Normal { std } => draw(&mut values, elements, |i| normal(stream, *std, i)),
            Start::Uniform { bound } => draw(&mut values, elements, |i| {
                let u = f64::from(philox::uniform(key, stream, i as u64));
                ((2.0 * u - 1.0) * bound) as f32
            }),
            Start::Shared { source, elements: length, std } => {
                // The draw is that of the first parameter that shares it.
                let shares = |p: &Parameter| matches!(&p.start, Start::Shared { source: s, .. } if s == source);
                let stream = list.iter().position(shares).map_or(stream, |first| first as u32);
                let mut once = Vec::new();
                draw(&mut once, *length, |i| normal(stream, *std, i));
                values.extend(once.iter().cycle().take(elements));
            }
        }
        set(parameter, &values)?;
    }
    Ok(())
}

/// Below this many values a thread takes longer to start than to draw its share.
const SHARE: usize = 1 << 16;

/// Fills `values` with `value(0)`, `value(1)`, .. up to `elements`, on all cores: the largest models have tens of billions.
fn draw(values: &mut Vec<f32>, elements: usize, value: impl Fn(usize) -> f32 + Sync) {
    values.resize(elements, 0.0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = elements.div_ceil(threads).max(SHARE);
    std::thread::scope(|scope| {
        let value = &value;
        for (part, values) in values.chunks_mut(share).enumerate() {
            let mut fill = move || values.iter_mut().enumerate().for_each(|(i, v)| *v = value(part * share + i));
            if elements <= share {
                fill();
            } else {
                scope.spawn(fill);
            }
        }
    });
}
