//! Files that are either whole or not there.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a file under a temporary name in the same folder, syncs it and renames it to `path`. On an error the temporary
/// file is removed and whatever was at `path` is untouched.
pub(crate) fn write_atomic<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<(), E>,
) -> Result<(), E> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    };
    let file_name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // Process and counter, so that two writers of one file never share a temporary name.
    let mut name = file_name.to_owned();
    name.push(format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    let temporary = folder.join(name);
    let result = (|| {
        // Readable too, for a writer that checks or maps what it wrote.
        let mut file = File::options().read(true).write(true).create_new(true).open(&temporary)?;
        write(&mut file)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        Ok(())
    })();
    match result {
        // The name is only safe once the folder is; some systems cannot sync a folder, and the content is safe anyway.
        Ok(()) => drop(File::open(folder).and_then(|folder| folder.sync_all())),
        Err(_) => drop(std::fs::remove_file(&temporary)),
    }
    result
}
