//! Files that are either whole or not there.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A file under a temporary name beside its own. Unless [`AtomicFile::commit`] is called it goes away when dropped, and whatever
/// was at its path is untouched.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    /// To be written; readable too, for a writer that checks or maps what it wrote.
    pub(crate) file: File,
    path: PathBuf,
    /// Until it has its name.
    temporary: Option<PathBuf>,
}

impl AtomicFile {
    /// Begins a file that is to be at `path`.
    pub(crate) fn create(path: &Path) -> io::Result<AtomicFile> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let file_name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // Process and counter, so that two writers of one file never share a temporary name.
        let mut name = file_name.to_owned();
        name.push(format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let temporary = folder(path).join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&temporary)?;
        Ok(AtomicFile { file, path: path.to_owned(), temporary: Some(temporary) })
    }

    /// Syncs the file and gives it its name.
    pub(crate) fn commit(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if let Some(temporary) = &self.temporary {
            std::fs::rename(temporary, &self.path)?;
        }
        self.temporary = None;
        // The name is only safe once the folder is; some systems cannot sync a folder, and the content is safe anyway.
        drop(File::open(folder(&self.path)).and_then(|folder| folder.sync_all()));
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            drop(std::fs::remove_file(temporary));
        }
    }
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    }
}

/// Writes a file under a temporary name in the same folder, syncs it and renames it to `path`. On an error the temporary
/// file is removed and whatever was at `path` is untouched.
pub(crate) fn write_atomic<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    let mut atomic = AtomicFile::create(path)?;
    write(&mut atomic.file)?;
    Ok(atomic.commit()?)
}
