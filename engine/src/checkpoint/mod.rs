//! Checkpoints of a training run: `DIR/checkpoints/step-N/{model.safetensors, optimizer.safetensors, state.json}`.
//!
//! A checkpoint is whole or it is not there. All files are written into `step-N.tmp-PID`, synced, and the folder is then
//! renamed; a folder that is replaced or removed is first renamed to `step-N.old-PID` or `step-N.del-PID`. What a killed
//! process left under such names is put right when the checkpoints are next opened. A writer holds the lock of
//! `checkpoints/.lock` while it works, and the system frees it when the writer dies, so that leftovers are told from work
//! in progress whatever process ids are reused.
//!
//! Every byte is covered by an xxh3-128 hash kept in `state.json`, which carries its own.

mod disk;
mod error;
#[cfg(test)]
mod faults;
mod read;
mod state;
mod tensors;
#[cfg(test)]
mod tests;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, TryLockError},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use self::{
    disk::{Disk, io_error},
    state::StateFile,
};
pub use self::{
    error::{CheckpointError, Damage, DamagedTensor, Mismatch, Operation},
    read::TensorFile,
    state::{FORMAT, TrainState},
    tensors::{Dtype, Tensor, TensorInfo},
};

/// File name of the weights in a checkpoint.
pub const MODEL_FILE: &str = "model.safetensors";
/// File name of the optimizer's tensors in a checkpoint.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// File name of the training state in a checkpoint.
pub const STATE_FILE: &str = "state.json";

/// What a checkpoint is made of. Tensors are borrowed or fetched one at a time.
#[derive(Debug)]
pub struct Snapshot<'a> {
    /// Where the run stands; `state.step` names the checkpoint.
    pub state: TrainState,
    /// The weights.
    pub model: Vec<Tensor<'a>>,
    /// The optimizer's tensors.
    pub optimizer: Vec<Tensor<'a>>,
}

/// A checkpoint open for reading. `state.json`, the lengths and the headers have been checked; each tensor is checked when
/// it is read, all of them by `verify`.
#[derive(Debug)]
pub struct Checkpoint {
    /// Where the run stood.
    pub state: TrainState,
    /// The weights.
    pub model: TensorFile,
    /// The optimizer's tensors.
    pub optimizer: TensorFile,
    path: PathBuf,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path`, as `DIR/checkpoints/step-N`.
    ///
    /// # Errors
    /// `NotACheckpoint` for another folder, `Damaged` naming the file, `Format` for another version, `Io`.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint, CheckpointError> {
        let path = path.as_ref();
        let wanted = vec![MODEL_FILE, OPTIMIZER_FILE, STATE_FILE];
        let missing: Vec<_> = wanted.iter().copied().filter(|name| !path.join(name).exists()).collect();
        if missing.len() == wanted.len() {
            return Err(CheckpointError::NotACheckpoint { path: path.to_path_buf(), wanted, missing });
        }
        let state_path = path.join(STATE_FILE);
        let bytes = match fs::read(&state_path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(CheckpointError::Damaged { path: state_path, damage: Damage::Absent });
            }
            read => read.map_err(io_error(Operation::Read, &state_path))?,
        };
        let StateFile { format: _, state, files } = StateFile::from_bytes(&bytes, &state_path)?;
        let open = |name: &str| {
            let path = path.join(name);
            match files.get(name) {
                Some(record) => TensorFile::open_with(&path, Some(record)),
                None => Err(CheckpointError::Damaged { path, damage: Damage::Undescribed }),
            }
        };
        let (model, optimizer) = (open(MODEL_FILE)?, open(OPTIMIZER_FILE)?);
        Ok(Checkpoint { state, model, optimizer, path: path.to_path_buf() })
    }

    /// The checkpoint's folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads everything and compares it with the hashes it was written with.
    ///
    /// # Errors
    /// `Damaged` naming the file and all damaged tensors of it; `Io`.
    pub fn verify(&mut self) -> Result<(), CheckpointError> {
        self.model.verify()?;
        self.optimizer.verify()
    }
}

/// The newest good checkpoint and the newer ones that are not.
#[derive(Debug)]
pub struct Intact {
    /// The newest checkpoint of which every byte is as written, `None` when there is none.
    pub checkpoint: Option<Checkpoint>,
    /// Newer checkpoints that cannot be used and why, newest first. The program should say so.
    pub damaged: Vec<(u64, CheckpointError)>,
}

/// The checkpoints of one run, in `DIR/checkpoints`.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
    disk: Disk,
}

/// What a name in the folder of checkpoints means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    /// A checkpoint.
    Step(u64),
    /// Being written.
    New,
    /// A checkpoint being replaced: the good one until its successor has its name.
    Old(u64),
    /// Being removed.
    Gone,
}

impl Name {
    /// Strict, so that nobody's own files are taken for leftovers.
    fn parse(name: &str) -> Option<Name> {
        let number = |text: &str| text.parse::<u64>().ok().filter(|n| n.to_string() == text);
        let rest = name.strip_prefix("step-")?;
        let Some((step, tail)) = rest.split_once('.') else { return number(rest).map(Name::Step) };
        let step = number(step)?;
        let (kind, pid) = tail.split_once('-')?;
        number(pid)?;
        match kind {
            "tmp" => Some(Name::New),
            "old" => Some(Name::Old(step)),
            "del" => Some(Name::Gone),
            _ => None,
        }
    }
}

impl Checkpoints {
    /// For a run that writes: makes `run_dir/checkpoints` if need be, checks that it can be written to, and puts right
    /// what a killed writer left. At most `keep_last` checkpoints are kept, all of them when it is 0.
    ///
    /// # Errors
    /// `Io` naming the folder that cannot be made or written to.
    pub fn create(run_dir: impl AsRef<Path>, keep_last: usize) -> Result<Checkpoints, CheckpointError> {
        let checkpoints = Self::at(run_dir.as_ref(), keep_last);
        checkpoints.disk.create_folder(&checkpoints.dir)?;
        let _lock = checkpoints.lock()?;
        checkpoints.recover()?;
        let probe = checkpoints.name(0, Some("tmp"));
        checkpoints.disk.create_folder(&probe)?;
        checkpoints.disk.remove_folder(&probe)?;
        Ok(checkpoints)
    }

    /// For a reader. What a killed writer left is put right if this process may write there and no writer is at work.
    ///
    /// # Errors
    /// `Io` when `run_dir/checkpoints` cannot be listed, as when it does not exist.
    pub fn open(run_dir: impl AsRef<Path>) -> Result<Checkpoints, CheckpointError> {
        let checkpoints = Self::at(run_dir.as_ref(), 0);
        checkpoints.list()?;
        let lock_path = checkpoints.dir.join(".lock");
        if let Ok(lock) = File::options().write(true).create(true).truncate(false).open(&lock_path)
            && !matches!(lock.try_lock(), Err(TryLockError::WouldBlock))
        {
            // A reader gets along without: `list` and `load` know the names of leftovers.
            drop(checkpoints.recover());
        }
        Ok(checkpoints)
    }

    fn at(run_dir: &Path, keep_last: usize) -> Checkpoints {
        Checkpoints { dir: run_dir.join("checkpoints"), keep_last, disk: Disk::default() }
    }

    /// The folder that holds the checkpoints.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn name(&self, step: u64, kind: Option<&str>) -> PathBuf {
        match kind {
            Some(kind) => self.dir.join(format!("step-{step}.{kind}-{}", std::process::id())),
            None => self.dir.join(format!("step-{step}")),
        }
    }

    /// Waits for the writers' lock; it is held until the file is dropped. On a file system without locks there must be
    /// only one writer.
    fn lock(&self) -> Result<File, CheckpointError> {
        let path = self.dir.join(".lock");
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(io_error(Operation::Lock, &path))?;
        match file.lock() {
            Err(e) if e.kind() != ErrorKind::Unsupported => Err(io_error(Operation::Lock, &path)(e)),
            Ok(()) | Err(_) => Ok(file),
        }
    }

    fn names(&self) -> Result<Vec<(Name, PathBuf)>, CheckpointError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io_error(Operation::List, &self.dir))? {
            let entry = entry.map_err(io_error(Operation::List, &self.dir))?;
            if let Some(name) = entry.file_name().to_str().and_then(Name::parse) {
                names.push((name, entry.path()));
            }
        }
        Ok(names)
    }

    /// Puts right what dead writers left: a checkpoint that was being replaced gets its name back, the rest is removed.
    /// Call it under the lock only.
    fn recover(&self) -> Result<(), CheckpointError> {
        let names = self.names()?;
        let mut steps: BTreeSet<u64> =
            names.iter().filter_map(|(name, _)| if let Name::Step(n) = name { Some(*n) } else { None }).collect();
        for (name, path) in &names {
            match name {
                Name::Step(_) => {}
                Name::Old(step) if steps.insert(*step) => {
                    self.disk.rename(path, &self.name(*step, None))?;
                    self.disk.sync_folder(&self.dir)?;
                }
                Name::Old(_) | Name::New | Name::Gone => self.disk.remove_folder(path)?,
            }
        }
        Ok(())
    }

    /// The steps of all checkpoints, ascending. Whether they are intact is not looked at.
    ///
    /// # Errors
    /// `Io`.
    pub fn list(&self) -> Result<Vec<u64>, CheckpointError> {
        Ok(self.paths()?.into_keys().collect())
    }

    fn paths(&self) -> Result<BTreeMap<u64, PathBuf>, CheckpointError> {
        let mut paths = BTreeMap::new();
        for (name, path) in self.names()? {
            match name {
                Name::Step(step) => drop(paths.insert(step, path)),
                Name::Old(step) => drop(paths.entry(step).or_insert(path)),
                Name::New | Name::Gone => {}
            }
        }
        Ok(paths)
    }

    /// The step of the newest checkpoint, whether intact or not.
    ///
    /// # Errors
    /// `Io`.
    pub fn latest(&self) -> Result<Option<u64>, CheckpointError> {
        Ok(self.list()?.pop())
    }

    /// Opens the checkpoint of a step.
    ///
    /// # Errors
    /// `NoSuchStep` with the steps there are; else as `Checkpoint::open`.
    pub fn load(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        let mut paths = self.paths()?;
        match paths.remove(&step) {
            Some(path) => Checkpoint::open(path),
            None => {
                Err(CheckpointError::NoSuchStep { dir: self.dir.clone(), step, available: paths.into_keys().collect() })
            }
        }
    }

    /// The newest checkpoint of which every byte is as written (it is read once for that), and the newer ones that are
    /// not, with the reasons.
    ///
    /// # Errors
    /// `Io` when the folder cannot be listed. A checkpoint that cannot be read counts as damaged.
    pub fn latest_intact(&self) -> Result<Intact, CheckpointError> {
        let mut damaged = Vec::new();
        for (step, path) in self.paths()?.into_iter().rev() {
            match Checkpoint::open(path).and_then(|mut c| c.verify().map(|()| c)) {
                Ok(checkpoint) => return Ok(Intact { checkpoint: Some(checkpoint), damaged }),
                Err(why) => damaged.push((step, why)),
            }
        }
        Ok(Intact { checkpoint: None, damaged })
    }

    /// Writes a checkpoint, replacing one of the same step, and then removes the oldest beyond `keep_last`. When this
    /// returns, the checkpoint is on the disk. Checkpoints of later steps, as after going back to an older one, are left
    /// alone. Returns the checkpoint's folder.
    ///
    /// # Errors
    /// `Io` (a full disk among them), `TensorNames`, `TensorSize`, `Source`. All earlier checkpoints are then as they were.
    pub fn save(&self, snapshot: Snapshot<'_>) -> Result<PathBuf, CheckpointError> {
        self.disk.create_folder(&self.dir)?;
        let _lock = self.lock()?;
        self.recover()?;
        let saved = self.save_locked(snapshot);
        if saved.is_err() {
            // Frees the disk at once. If it cannot, the next opening does; the first error is the one to report.
            drop(self.recover());
        }
        saved
    }

    fn save_locked(&self, snapshot: Snapshot<'_>) -> Result<PathBuf, CheckpointError> {
        let Snapshot { state, model, optimizer } = snapshot;
        let step = state.step;
        let (new, path) = (self.name(step, Some("tmp")), self.name(step, None));
        self.disk.create_folder(&new)?;
        let metadata = weights_metadata(&state.model, &state.config);
        let mut files = BTreeMap::new();
        for (name, metadata, tensors) in
            [(MODEL_FILE, metadata, model), (OPTIMIZER_FILE, weights_metadata(&state.model, ""), optimizer)]
        {
            let out = self.disk.create(&new.join(name))?;
            files.insert(name.to_string(), write::write_tensors(out, &metadata, tensors)?);
        }
        let state_path = new.join(STATE_FILE);
        let text = StateFile { format: FORMAT, state, files }.to_text(&state_path)?;
        let mut out = self.disk.create(&state_path)?;
        out.write(text.as_bytes())?;
        out.finish()?;
        self.disk.sync_folder(&new)?;
        let old = self.name(step, Some("old"));
        let replaces = path.exists();
        if replaces {
            self.disk.rename(&path, &old)?;
        }
        self.disk.rename(&new, &path)?;
        self.disk.sync_folder(&self.dir)?;
        // The new checkpoint is on the disk; only now may anything go. What cannot be removed is removed next time, and is
        // no reason to call the save failed.
        if replaces {
            drop(self.disk.remove_folder(&old));
        }
        drop(self.rotate(step));
        Ok(path)
    }

    fn rotate(&self, saved: u64) -> Result<(), CheckpointError> {
        if self.keep_last == 0 {
            return Ok(());
        }
        let earlier: Vec<u64> = self.list()?.into_iter().filter(|&s| s <= saved).collect();
        for &step in earlier.iter().rev().skip(self.keep_last) {
            // One rename takes a checkpoint away whole; removing its files does not.
            let gone = self.name(step, Some("del"));
            self.disk.rename(&self.name(step, None), &gone)?;
            self.disk.remove_folder(&gone)?;
        }
        Ok(())
    }
}

/// The text pairs of a weights file: with them the file alone says what it is.
fn weights_metadata(model: &str, config: &str) -> BTreeMap<String, String> {
    [("format", "moebius"), ("model", model), ("config", config)]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect()
}

/// Writes weights alone, as a safetensors file any reader of that format can read, whole or not at all. Its metadata are
/// `format` = "moebius", `model` and `config` (TOML text).
///
/// # Errors
/// `Io`, `TensorNames`, `TensorSize`, `Source`. A file that was there is then as it was.
pub fn export_weights(
    path: impl AsRef<Path>,
    model: &str,
    config: &str,
    tensors: Vec<Tensor<'_>>,
) -> Result<(), CheckpointError> {
    let path = path.as_ref();
    let disk = Disk::default();
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".tmp-{}", std::process::id()));
    let new = PathBuf::from(new);
    let written = disk
        .create(&new)
        .and_then(|out| write::write_tensors(out, &weights_metadata(model, config), tensors))
        .and_then(|_| disk.rename(&new, path));
    if let Err(error) = written {
        drop(disk.remove_file(&new));
        return Err(error);
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    disk.sync_folder(parent)
}
