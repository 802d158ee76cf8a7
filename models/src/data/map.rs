//! Files mapped into memory: the one place of this crate that needs `unsafe`.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use super::DataError;

/// Maps a regular file for reading. The bytes of a map may change when another program writes to the file, so callers
/// must not rely on what they checked earlier (an id is checked again where it is used, text is copied before it is
/// taken as UTF-8).
pub(super) fn map_file(path: &Path) -> Result<Mmap, DataError> {
    let fail = |source: std::io::Error| {
        if source.kind() == std::io::ErrorKind::NotFound {
            return DataError::Missing { path: path.to_owned() };
        }
        DataError::Io { action: "read", path: path.to_owned(), source }
    };
    // Asked before opening: opening a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        return Err(DataError::NotAFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(fail)?;
    if file.metadata().map_err(fail)?.len() == 0 {
        return Err(DataError::Empty { name: path.display().to_string(), bytes: 0 });
    }
    // SAFETY: the map is read-only and only ever read as plain bytes, for which every bit pattern is valid. A file that
    // another program shortens while it is mapped raises SIGBUS, which ends the process without touching data.
    #[expect(unsafe_code, reason = "memmap2 has no safe constructor; text of many GB must not be read into memory")]
    unsafe { Mmap::map(&file) }.map_err(fail)
}
