//! Every change made to the disk goes through here: one place for the errors' words, and one where the tests let the
//! disk fill up or the process die between any two changes.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::error::{CheckpointError, Operation};

pub(super) fn io_error(operation: Operation, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    move |source| CheckpointError::Io { operation, path: path.to_path_buf(), source }
}

/// The changes a checkpoint makes to a disk.
#[derive(Debug, Default)]
pub(super) struct Disk {
    /// The tests' way to make changes fail.
    #[cfg(test)]
    pub(super) faults: super::faults::Faults,
}

impl Disk {
    /// Asks the tests whether this change happens at all.
    #[cfg(test)]
    fn change(&self, operation: Operation, path: &Path, bytes: usize) -> Result<(), CheckpointError> {
        self.faults.change(bytes).map_err(io_error(operation, path))
    }

    #[cfg(not(test))]
    #[inline(always)]
    fn change(&self, _: Operation, _: &Path, _: usize) -> Result<(), CheckpointError> {
        Ok(())
    }

    pub(super) fn create_folder(&self, path: &Path) -> Result<(), CheckpointError> {
        self.change(Operation::CreateFolder, path, 0)?;
        fs::create_dir_all(path).map_err(io_error(Operation::CreateFolder, path))
    }

    pub(super) fn create(&self, path: &Path) -> Result<OutFile<'_>, CheckpointError> {
        self.change(Operation::Create, path, 0)?;
        let file = File::create(path).map_err(io_error(Operation::Create, path))?;
        Ok(OutFile { disk: self, file, path: path.to_path_buf() })
    }

    /// Renames a file or folder. The rename is on the disk only after `sync_folder` of the parent.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<(), CheckpointError> {
        self.change(Operation::Rename, from, 0)?;
        fs::rename(from, to).map_err(io_error(Operation::Rename, from))
    }

    pub(super) fn remove_file(&self, path: &Path) -> Result<(), CheckpointError> {
        self.change(Operation::Remove, path, 0)?;
        fs::remove_file(path).map_err(io_error(Operation::Remove, path))
    }

    /// Removes a folder and the files in it, file by file: a kill between two of them leaves a part.
    pub(super) fn remove_folder(&self, path: &Path) -> Result<(), CheckpointError> {
        for entry in fs::read_dir(path).map_err(io_error(Operation::List, path))? {
            let entry = entry.map_err(io_error(Operation::List, path))?.path();
            if entry.is_dir() { self.remove_folder(&entry)? } else { self.remove_file(&entry)? }
        }
        self.change(Operation::Remove, path, 0)?;
        fs::remove_dir(path).map_err(io_error(Operation::Remove, path))
    }

    /// Waits until the names in a folder are on the disk.
    pub(super) fn sync_folder(&self, path: &Path) -> Result<(), CheckpointError> {
        self.change(Operation::Sync, path, 0)?;
        // Only Unix lets a program open a folder to sync it; elsewhere a rename is as durable as the system makes it.
        if cfg!(unix) {
            let folder = File::open(path).map_err(io_error(Operation::Open, path))?;
            folder.sync_all().map_err(io_error(Operation::Sync, path))?;
        }
        Ok(())
    }
}

/// A new file being written.
#[derive(Debug)]
pub(super) struct OutFile<'d> {
    disk: &'d Disk,
    file: File,
    path: PathBuf,
}

impl OutFile<'_> {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.disk.change(Operation::Write, &self.path, bytes.len())?;
        self.file.write_all(bytes).map_err(io_error(Operation::Write, &self.path))
    }

    /// Ends the file and waits until it is on the disk.
    pub(super) fn finish(self) -> Result<(), CheckpointError> {
        self.disk.change(Operation::Sync, &self.path, 0)?;
        self.file.sync_all().map_err(io_error(Operation::Sync, &self.path))
    }
}
