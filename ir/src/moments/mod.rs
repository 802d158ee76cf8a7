//! How an optimizer keeps its moments: in f32, or in fewer bits, rounded at random.
//!
//! The second moment is `v' = beta2 v + (1 - beta2) g²`. With beta2 = 0.999 one step moves it by about a thousandth, which is less
//! than half the spacing of bf16 (a 128th to a 256th): rounded to nearest it would never move. So both moments are rounded
//! stochastically: a number between two neighbours that can be stored becomes the upper one with a probability that is its
//! distance from the lower one in parts of theirs, and its expectation is the number itself (Gupta et al., arXiv 1502.02551,
//! section 3). What is stored wanders around the moment instead of lagging behind it.
//!
//! 8 bits are codes of blocks of numbers with a scale for each block: see [`eight`].
//!
//! The random numbers are those of [`crate::philox`] with a key of their own: [`words`] are a pure function of the tensor's stream,
//! the step and the element, so that every backend and every run has the same. A step computes with the moments before they are
//! rounded.
//!
//! The functions are public for backends: elementary operations of f32 that round equally on every machine.

pub mod eight;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::philox;
use crate::types::{Shape, TensorType};

/// Tensors of fewer elements are not kept in 8 bits.
pub const SMALL: u64 = 4096;

/// How the moments of a parameter are kept between steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Moments {
    /// As they are: 8 bytes for each parameter.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// In bf16, rounded stochastically: 4 bytes for each parameter.
    #[serde(rename = "bf16")]
    Bf16,
    /// In codes of 8 bits with two scales for 256 parameters, rounded stochastically ([`eight`]): 2 bytes for each parameter, and 8
    /// for each block.
    #[serde(rename = "8bit")]
    Eight,
}

impl Moments {
    /// Every way.
    pub const ALL: [Moments; 3] = [Moments::F32, Moments::Bf16, Moments::Eight];

    /// The name in configurations and graphs.
    pub const fn name(self) -> &'static str {
        match self {
            Moments::F32 => "f32",
            Moments::Bf16 => "bf16",
            Moments::Eight => "8bit",
        }
    }

    /// What a moment of a parameter of this shape is kept in. In 8 bits: u32 `[elements / 4]`, rounded up, of which a word holds the
    /// codes of four neighbours in row-major order, the first in its lowest byte; bytes beyond the last element are 0.
    pub fn ty(self, shape: &Shape) -> TensorType {
        match self {
            Moments::F32 => TensorType::f32(shape.clone()),
            Moments::Bf16 => TensorType::new(DType::Bf16, shape.clone()),
            Moments::Eight => TensorType::new(DType::U32, [shape.elements().div_ceil(4)]),
        }
    }

    /// What the scales of both moments are kept in, where there are any: f32 `[blocks, 2]`, of each block of [`eight::BLOCK`]
    /// elements in row-major order that of the first moment and that of the second.
    pub fn scales(self, shape: &Shape) -> Option<TensorType> {
        match self {
            Moments::F32 | Moments::Bf16 => None,
            Moments::Eight => Some(TensorType::f32([shape.elements().div_ceil(eight::BLOCK), 2])),
        }
    }

    /// How the moments of a parameter of so many elements are kept where this is what is asked for: small tensors (biases, norms,
    /// some routers) stay in f32 instead of 8 bits, as in the paper of [`eight`]. They take no memory worth saving.
    pub const fn of_tensor(self, elements: u64) -> Moments {
        match self {
            Moments::Eight if elements < SMALL => Moments::F32,
            Moments::F32 | Moments::Bf16 | Moments::Eight => self,
        }
    }

    /// Bytes of both moments of a parameter of so many elements.
    pub const fn bytes(self, elements: u64) -> u64 {
        match self {
            Moments::F32 => elements.saturating_mul(8),
            Moments::Bf16 => elements.saturating_mul(4),
            Moments::Eight => (elements.div_ceil(4).saturating_mul(8))
                .saturating_add(elements.div_ceil(eight::BLOCK as u64).saturating_mul(8)),
        }
    }

    /// Whether this is the default; what graphs and files leave out.
    pub(crate) fn is_default(&self) -> bool {
        *self == Moments::F32
    }
}

impl fmt::Display for Moments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Moments {
    type Err = String;

    /// Reads a name; the error names all that there are.
    fn from_str(name: &str) -> Result<Moments, String> {
        let names = || Moments::ALL.map(Moments::name).join(", ");
        let found = Moments::ALL.into_iter().find(|m| m.name() == name);
        found.ok_or_else(|| format!("wanted moments in one of {}, found `{name}`", names()))
    }
}

/// The key of all roundings: "moment" and "rounding" cut to four letters.
pub const KEY: [u32; 2] = [u32::from_be_bytes(*b"mome"), u32::from_be_bytes(*b"roun")];

/// The stream of a parameter's roundings, a hash of its name (FNV-1a): what other parameters there are does not matter.
pub fn stream(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// The counter of a group's random words; `step` is counted from 1, so that no other stream of numbers has it.
#[inline(always)]
pub fn counter(stream: u32, step: u32, group: u64) -> [u32; 4] {
    [group as u32, (group >> 32) as u32, stream, step]
}

/// The random words of the elements `4 group..4 group + 4`. In bf16 the lower half of an element's word rounds its first moment, the
/// upper half its second; in 8 bits the middle half rounds the first, the outer quarters ([`for_second`]) the second.
pub fn words(stream: u32, step: u32, group: u64) -> [u32; 4] {
    philox::philox4x32_10(KEY, counter(stream, step, group))
}

/// The word with its halves exchanged, so that its middle half is one that no first moment in 8 bits was rounded by.
#[inline(always)]
pub fn for_second(word: u32) -> u32 {
    word.rotate_left(16)
}

/// The bits of `x` in bf16, rounded stochastically with 16 random bits: they are added to those that are cut off. Infinities
/// stay, a NaN becomes a quiet one.
#[inline(always)]
pub fn bf16_bits(x: f32, random: u32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(random & 0xffff) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet_nan } else { rounded }) as u16
}

/// The number of these bits of bf16.
#[inline(always)]
pub fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_refused_with_the_choices() {
        for moments in Moments::ALL {
            assert_eq!(moments.name().parse(), Ok(moments));
            let json = serde_json::to_string(&moments).unwrap();
            assert_eq!(json, format!("\"{moments}\""));
            assert_eq!(serde_json::from_str::<Moments>(&json).unwrap(), moments);
        }
        let refused = "f16".parse::<Moments>().unwrap_err();
        assert!(refused.contains("f32, bf16, 8bit") && refused.contains("`f16`"), "{refused}");
    }

    #[test]
    fn bytes_are_those_of_the_types() {
        for moments in Moments::ALL {
            for n in [0, 1, 4, 5, 255, 256, 257, 5000] {
                let shape = Shape::from([n]);
                let bytes = |ty: TensorType| (ty.elements() * ty.dtype.bytes()) as u64;
                let all = 2 * bytes(moments.ty(&shape)) + moments.scales(&shape).map_or(0, bytes);
                assert_eq!(moments.bytes(n as u64), all, "{n} in {moments}");
            }
        }
        assert_eq!([SMALL - 1, SMALL].map(|n| Moments::Eight.of_tensor(n)), [Moments::F32, Moments::Eight]);
        assert_eq!(Moments::Bf16.of_tensor(1), Moments::Bf16);
    }

    #[test]
    fn words_differ_by_stream_step_and_group() {
        let all = [words(1, 2, 3), words(2, 2, 3), words(1, 3, 3), words(1, 2, 4), words(1, 2, 3 + (1 << 32))];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "{i}");
        }
        assert_ne!(stream("block.0.bias"), stream("block.1.bias"));
    }

    #[test]
    fn bf16_takes_each_neighbour_as_often_as_it_is_near() {
        // Over all random halves: exactly in proportion, for either sign, in any binade and below the normal numbers.
        for x in [1.0f32, 1.3, -0.2, 3.3e38, -1e-39, 0.0, f32::from_bits(0x3f80_0001), f32::from_bits(0x3fff_ffff)] {
            let below = bf16((x.to_bits() >> 16) as u16);
            let above = f64::from(f32::from_bits((x.to_bits() & 0xffff_0000).wrapping_add(0x1_0000)));
            let ups = (0..1 << 16).filter(|&r| bf16(bf16_bits(x, r)) != below).count();
            let part = if x == below { 0.0 } else { (f64::from(x) - f64::from(below)) / (above - f64::from(below)) };
            // The largest numbers have no finite neighbour above.
            if above.is_finite() {
                assert_eq!(ups as f64, part * 65_536.0, "{x:e}");
            }
            assert!(ups == 0 || bf16(bf16_bits(x, 0xffff)).abs() > x.abs(), "{x:e}");
        }
        for random in [0, 0xffff] {
            assert_eq!(bf16(bf16_bits(f32::INFINITY, random)), f32::INFINITY);
            assert_eq!(bf16(bf16_bits(f32::NEG_INFINITY, random)), f32::NEG_INFINITY);
            assert!(bf16(bf16_bits(f32::from_bits(0x7f80_0001), random)).is_nan());
            assert!(bf16(bf16_bits(f32::from_bits(0xffff_ffff), random)).is_nan());
        }
    }
}
