//! `train.recompute`: `false`, `true` or `"light"`.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What the backward pass computes again instead of keeping it from the forward pass on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recompute {
    /// `false`: nothing.
    #[default]
    Nothing,
    /// `true`: the inside of each block. The least memory, and nearly a forward pass more to compute. Every bit is as without.
    Blocks,
    /// `"light"`: what costs little, such as activation functions and dispatched rows; results of products are kept, but not the outputs of
    /// experts where the backward pass can do without. The gates' gradient is summed in another order then.
    Light,
}

impl Recompute {
    /// As it is written in configurations and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Recompute::Nothing => "false",
            Recompute::Blocks => "true",
            Recompute::Light => "light",
        }
    }
}

impl FromStr for Recompute {
    type Err = String;

    /// Reads a name; the error names all that there are.
    fn from_str(name: &str) -> Result<Recompute, String> {
        let all = [Recompute::Nothing, Recompute::Blocks, Recompute::Light];
        all.into_iter().find(|r| r.name() == name).ok_or_else(|| format!("wanted true, false or light, found `{name}`"))
    }
}

impl Serialize for Recompute {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Recompute::Nothing => to.serialize_bool(false),
            Recompute::Blocks => to.serialize_bool(true),
            Recompute::Light => to.serialize_str(self.name()),
        }
    }
}

impl<'de> Deserialize<'de> for Recompute {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl Visitor<'_> for Reader {
            type Value = Recompute;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or \"light\"")
            }

            fn visit_bool<E: de::Error>(self, blocks: bool) -> Result<Recompute, E> {
                Ok(if blocks { Recompute::Blocks } else { Recompute::Nothing })
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Recompute, E> {
                let light = Some(Recompute::Light).filter(|light| light.name() == name);
                light.ok_or_else(|| E::invalid_value(Unexpected::Str(name), &self))
            }
        }

        from.deserialize_any(Reader)
    }
}
