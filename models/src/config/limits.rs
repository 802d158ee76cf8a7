//! How long a configuration's text may be and of how many parts, so that reading it takes little memory whatever it says.

use toml_parser::{Source, lexer::TokenKind};

use super::ConfigError;

/// The most bytes: some dozens of times the largest preset.
const MOST_BYTES: u64 = 64 << 10;
/// The most parts, where each token counts as one. The crate `toml` lists a text's tokens, then its events, and then builds
/// its values, at about 120 bytes for each token, which may be of one byte only.
const MOST_PARTS: usize = 1024;
/// What a token counts as that may make a table: the smallest has room for 11 entries, some 1,300 bytes.
const PARTS_OF_TABLE: usize = 12;

/// Refuses a text of more bytes than any configuration has.
pub(super) fn check_bytes(bytes: u64, origin: &str) -> Result<(), ConfigError> {
    if bytes > MOST_BYTES {
        return Err(ConfigError::TooLong { origin: origin.to_string(), most: MOST_BYTES, found: bytes });
    }
    Ok(())
}

/// Refuses a text of more bytes or parts than any configuration has. Nothing is allocated to find out.
pub(crate) fn check(text: &str, origin: &str) -> Result<(), ConfigError> {
    check_bytes(text.len() as u64, origin)?;
    let makes_table =
        |kind| matches!(kind, TokenKind::LeftSquareBracket | TokenKind::LeftCurlyBracket | TokenKind::Dot);
    let parts = |kind| if makes_table(kind) { PARTS_OF_TABLE } else { 1 };
    let found = Source::new(text).lex().map(|token| parts(token.kind())).sum();
    if found > MOST_PARTS {
        let table = PARTS_OF_TABLE;
        return Err(ConfigError::TooManyParts { origin: origin.to_string(), most: MOST_PARTS, table, found });
    }
    Ok(())
}
