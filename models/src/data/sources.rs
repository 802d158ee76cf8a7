//! Where text comes from.

use std::borrow::Cow;
use std::path::PathBuf;

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The text built into the program, see [`tiny_shakespeare`].
    TinyShakespeare,
    /// A file.
    File(PathBuf),
}

impl Source {
    /// The name shown to people: `"Tiny Shakespeare"` or the path.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::TinyShakespeare => Cow::Borrowed("Tiny Shakespeare"),
            Self::File(path) => path.to_string_lossy(),
        }
    }
}

/// Tiny Shakespeare: 1,115,394 bytes of ASCII, 40,000 lines of the plays, in the public domain; byte for byte the
/// `input.txt` of karpathy/char-rnn.
pub fn tiny_shakespeare() -> &'static [u8] {
    include_bytes!("../../../data/tinyshakespeare.txt")
}
