//! Element types.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The type of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32: the type of master weights, statistics and everything a router computes.
    F32,
    /// The upper half of a binary32; storage only, arithmetic is f32.
    Bf16,
    /// IEEE binary16; storage only, arithmetic is f32.
    F16,
    /// Token ids, expert indices, slots and offsets.
    I32,
    /// Random bits and generator keys.
    U32,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Every dtype.
    pub const ALL: [DType; 6] = [DType::F32, DType::Bf16, DType::F16, DType::I32, DType::U32, DType::Bool];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::Bool => 1,
        }
    }

    /// Whether values of this type have gradients.
    pub const fn is_float(self) -> bool {
        match self {
            DType::F32 | DType::Bf16 | DType::F16 => true,
            DType::I32 | DType::U32 | DType::Bool => false,
        }
    }

    /// The lower-case name used in text, configs and checkpoints.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::Bool => "bool",
        }
    }

    /// `value` as a stored element of this type would read back: floats rounded to nearest even, integers truncated
    /// and saturated, bools 0 or 1.
    pub fn round(self, value: f64) -> f64 {
        match self {
            DType::F32 => f64::from(value as f32),
            DType::Bf16 => half::bf16::from_f64(value).to_f64(),
            DType::F16 => half::f16::from_f64(value).to_f64(),
            DType::I32 => f64::from(value as i32),
            DType::U32 => f64::from(value as u32),
            DType::Bool => f64::from(u8::from(value != 0.0)),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        DType::ALL.into_iter().find(|d| d.name() == text).ok_or_else(|| text.to_owned())
    }
}
