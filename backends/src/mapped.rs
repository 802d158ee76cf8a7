//! A file as bytes in memory, loaded by the system page by page when it is looked at.

use std::fs::File;
use std::io;
use std::ops::Deref;

/// The whole of a file, mapped read-only.
///
/// For files that stay as they are: those that are written under a temporary name and renamed, and never changed after.
/// If another program shortens a mapped file, looking at the part that is gone ends this process by a signal; a file of
/// unknown origin is better read.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps `file`.
    ///
    /// # Errors
    /// Those of the system, for example for a file that is not a regular one.
    pub fn new(file: &File) -> io::Result<MappedFile> {
        // SAFETY: the mapping is read-only and private to this value; that nothing changes the file is what the type's doc
        // asks of the caller, and a change shows as other bytes, which every reader of a file must expect.
        unsafe { memmap2::Mmap::map(file) }.map(MappedFile)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::MappedFile;

    #[test]
    fn a_mapping_holds_the_bytes_of_the_file_also_after_it_was_removed() {
        let path = std::env::temp_dir().join(format!("moebius-mapped-{}", std::process::id()));
        let bytes: Vec<u8> = (0..10_000u32).flat_map(u32::to_le_bytes).collect();
        let mut file = std::fs::File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        file.write_all(&bytes).unwrap();
        let mapped = MappedFile::new(&file).unwrap();
        drop(file);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&*mapped, bytes);
    }
}
