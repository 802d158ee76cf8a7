//! Compiled kernels on disk.
//!
//! An entry's name is a hash of all that decides its content: source with its headers, options, architecture and compiler.
//! It is written under another name and renamed, so that it is whole or not there, and carries a checksum, so that damage is
//! noticed; a damaged entry counts as missing and is written anew.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_128;

/// First bytes of every entry.
const MAGIC: &[u8; 16] = b"moebius kernel 1";

/// What the cache has under a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The machine code, or what else a driver made.
    Code(Vec<u8>),
    /// No entry.
    Nothing,
    /// An entry that is damaged, and why it is called so.
    Damaged(String),
}

/// A folder of compiled kernels; without one, every lookup finds nothing.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    folder: Option<PathBuf>,
    /// How the names of its files end.
    ending: &'static str,
}

impl Cache {
    /// The user's cache: `MOEBIUS_CACHE`, else `XDG_CACHE_HOME/moebius`, else `HOME/.cache/moebius`.
    pub(crate) fn of_user(ending: &'static str) -> Cache {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = var("MOEBIUS_CACHE")
            .or_else(|| var("XDG_CACHE_HOME").map(|p| p.join("moebius")))
            .or_else(|| var("HOME").map(|p| p.join(".cache/moebius")));
        Cache { folder: root.map(|r| r.join("kernels")), ending }
    }

    /// A cache in this folder.
    #[cfg(test)]
    pub(crate) fn at(folder: &Path) -> Cache {
        Cache { folder: Some(folder.into()), ending: "code" }
    }

    /// The key of what `parts` decide.
    pub(crate) fn key(parts: &[&str]) -> u128 {
        let mut text = Vec::new();
        for part in parts {
            text.extend((part.len() as u64).to_le_bytes());
            text.extend(part.as_bytes());
        }
        xxh3_128(&text)
    }

    fn file(&self, folder: &Path, key: u128) -> PathBuf {
        folder.join(format!("{key:032x}.{}", self.ending))
    }

    /// The entry of a key.
    pub(crate) fn get(&self, key: u128) -> Found {
        let Some(folder) = &self.folder else { return Found::Nothing };
        let file = self.file(folder, key);
        let Ok(bytes) = std::fs::read(&file) else { return Found::Nothing };
        let damaged = |why: &str| Found::Damaged(format!("{}: {why}", file.display()));
        let Some((head, code)) = bytes.split_at_checked(32) else { return damaged("too short") };
        if head[..16] != MAGIC[..] {
            return damaged("not a kernel of this program");
        }
        if head[16..] != xxh3_128(code).to_le_bytes() {
            return damaged("its checksum is wrong");
        }
        Found::Code(code.to_vec())
    }

    /// Writes an entry. A cache that cannot be written costs time later, and is no error.
    pub(crate) fn put(&self, key: u128, code: &[u8]) -> std::io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        std::fs::create_dir_all(folder)?;
        let temporary = folder.join(format!("{key:032x}.{}.{:?}.new", std::process::id(), std::thread::current().id()));
        let bytes = [&MAGIC[..], &xxh3_128(code).to_le_bytes(), code].concat();
        let written =
            std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, self.file(folder, key)));
        if written.is_err() {
            // What is left of a failed write is of no use; that it cannot be removed changes nothing.
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_back_and_every_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(&folder.path().join("deeper"));
        let code: Vec<u8> = (0..200).collect();
        assert_eq!(cache.get(7), Found::Nothing);
        cache.put(7, &code).unwrap();
        assert_eq!((cache.get(7), cache.get(8)), (Found::Code(code.clone()), Found::Nothing));
        let file = cache.file(&folder.path().join("deeper"), 7);
        let whole = std::fs::read(&file).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&file, &bytes).unwrap();
            assert!(matches!(cache.get(7), Found::Damaged(_)), "byte {at}");
        }
        for len in [0, 31, whole.len() - 1] {
            std::fs::write(&file, &whole[..len]).unwrap();
            assert!(matches!(cache.get(7), Found::Damaged(_)), "{len} bytes");
        }
        // Written anew, it is whole again, and nothing else is left in the folder.
        cache.put(7, &code).unwrap();
        assert_eq!(cache.get(7), Found::Code(code));
        assert_eq!(std::fs::read_dir(folder.path().join("deeper")).unwrap().count(), 1);
    }

    #[test]
    fn keys_tell_parts_apart() {
        assert_ne!(Cache::key(&["ab", "c"]), Cache::key(&["a", "bc"]));
        assert_eq!(Cache::key(&["ab", "c"]), Cache::key(&["ab", "c"]));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_no_entry() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let cache = Cache::at(&file.join("below"));
        assert!(cache.put(1, b"code").is_err());
        assert_eq!(cache.get(1), Found::Nothing);
    }
}
