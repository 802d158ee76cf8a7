//! What can go wrong with a checkpoint: each error names the file, what was wanted and what was found.

use std::{fmt, io, path::PathBuf};

use super::tensors::TensorInfo;

/// What was being done to a file or a folder when the operating system refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Creating a folder.
    CreateFolder,
    /// Creating a file.
    Create,
    /// Opening a file for reading.
    Open,
    /// Reading from a file.
    Read,
    /// Writing to a file.
    Write,
    /// Waiting until a file or a folder is on the disk (`fsync`).
    Sync,
    /// Renaming a file or a folder.
    Rename,
    /// Removing a file or a folder.
    Remove,
    /// Listing a folder.
    List,
    /// Taking the writers' lock.
    Lock,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::CreateFolder => "create the folder",
            Operation::Create => "create",
            Operation::Open => "open",
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Sync => "sync",
            Operation::Rename => "rename",
            Operation::Remove => "remove",
            Operation::List => "list",
            Operation::Lock => "lock",
        })
    }
}

/// A tensor whose bytes are not the ones that were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedTensor {
    /// Name of the tensor.
    pub name: String,
    /// xxh3-128 of the bytes that were written.
    pub wanted: String,
    /// xxh3-128 of the bytes in the file now.
    pub found: String,
}

/// How a file of a checkpoint differs from what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// The file does not exist.
    Absent,
    /// The file has another length, in bytes.
    Length {
        /// Length that was written.
        wanted: u64,
        /// Length found.
        found: u64,
    },
    /// Every tensor is intact or cannot be told, but the bytes that describe them are not the ones written.
    Header {
        /// xxh3-128 of the header that was written.
        wanted: String,
        /// xxh3-128 of the header in the file now.
        found: String,
    },
    /// Tensors whose bytes have changed, in the order of the file.
    Tensors(Vec<DamagedTensor>),
    /// `state.json` does not match the hash it carries.
    State {
        /// The hash `state.json` carries, `None` when even its place is damaged.
        wanted: Option<String>,
        /// The hash of its content now.
        found: String,
    },
    /// `state.json` matches its hash but does not describe the file it should.
    Undescribed,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::Absent => write!(f, "the file is missing"),
            Damage::Length { wanted, found } if found < wanted => {
                write!(f, "the file is truncated: wanted {wanted} bytes, found {found}")
            }
            Damage::Length { wanted, found } => write!(f, "wanted {wanted} bytes, found {found}"),
            Damage::Header { wanted, found } => {
                write!(f, "the header is damaged: wanted xxh3-128 {wanted}, found {found}")
            }
            Damage::Tensors(tensors) => {
                let named: Vec<String> = tensors
                    .iter()
                    .map(|t| format!("`{}` (wanted xxh3-128 {}, found {})", t.name, t.wanted, t.found))
                    .collect();
                write!(f, "{} damaged: {}", count(tensors.len(), "tensor"), named.join(", "))
            }
            Damage::State { wanted: Some(wanted), found } => {
                write!(f, "its content does not match its own hash: wanted xxh3-128 {wanted}, found {found}")
            }
            Damage::State { wanted: None, found } => {
                write!(f, "wanted it to begin with its own hash, found other bytes (content xxh3-128 {found})")
            }
            Damage::Undescribed => write!(f, "state.json holds no length and hash for it"),
        }
    }
}

/// How the tensors of a file differ from the tensors a model wants. All differences at once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mismatch {
    /// Wanted by the model, not in the file.
    pub missing: Vec<TensorInfo>,
    /// In the file, not wanted by the model.
    pub unexpected: Vec<TensorInfo>,
    /// In both, with another dtype or shape: (wanted, found).
    pub different: Vec<(TensorInfo, TensorInfo)>,
}

impl Mismatch {
    /// True when nothing differs.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.different.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.different.is_empty() {
            let named: Vec<String> = self
                .different
                .iter()
                .map(|(wanted, found)| {
                    format!(
                        "`{}` wanted {} {:?}, found {} {:?}",
                        wanted.name, wanted.dtype, wanted.shape, found.dtype, found.shape
                    )
                })
                .collect();
            parts.push(format!("{} of another dtype or shape: {}", count(named.len(), "tensor"), named.join("; ")));
        }
        for (what, tensors) in [("missing", &self.missing), ("unexpected", &self.unexpected)] {
            if !tensors.is_empty() {
                let named: Vec<String> =
                    tensors.iter().map(|t| format!("`{}` {} {:?}", t.name, t.dtype, t.shape)).collect();
                parts.push(format!("{} {what}: {}", count(named.len(), "tensor"), named.join("; ")));
            }
        }
        f.write_str(&parts.join(". "))
    }
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// Why a checkpoint could not be written, found or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused: a full disk, a missing folder, a file that may not be written.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: Operation,
        /// To which file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file of a checkpoint is not what was written.
    #[error("{} is damaged: {damage}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it differs.
        damage: Damage,
    },
    /// The checkpoint holds other tensors than the model wants, as one of another model does.
    #[error("{} does not fit the model: {mismatch}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// All differences.
        mismatch: Box<Mismatch>,
    },
    /// No checkpoint of that step.
    #[error("no checkpoint of step {step} in {}: found steps {available:?}", dir.display())]
    NoSuchStep {
        /// The folder searched.
        dir: PathBuf,
        /// The step wanted.
        step: u64,
        /// The steps there.
        available: Vec<u64>,
    },
    /// Not a folder with a checkpoint.
    #[error("{} is no checkpoint: wanted the files {wanted:?} in it, missing {missing:?}", path.display())]
    NotACheckpoint {
        /// The folder.
        path: PathBuf,
        /// Files a checkpoint has.
        wanted: Vec<&'static str>,
        /// Those not there.
        missing: Vec<&'static str>,
    },
    /// `state.json` is intact but written by another version of the format.
    #[error("{} has format {found}, wanted {wanted}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The version this program reads.
        wanted: u32,
        /// The version found.
        found: u32,
    },
    /// `state.json` is intact but cannot be understood, or cannot be written as JSON.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The field and the place in the file.
        source: serde_json::Error,
    },
    /// Not a safetensors file.
    #[error("{} is no safetensors file: {source}", path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with the header.
        source: serde_json::Error,
    },
    /// The header of a safetensors file has an impossible length.
    #[error(
        "{} is no safetensors file: wanted a header of 2 to {limit} bytes, found a length of {found} in a file of {file} bytes",
        path.display()
    )]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// The longest header possible here.
        limit: u64,
        /// The length it states.
        found: u64,
        /// Length of the whole file.
        file: u64,
    },
    /// A safetensors file with dtypes the engine does not have.
    #[error("{} holds tensors of dtypes other than F32, BF16, F16, I32, U32, BOOL: {tensors:?}", path.display())]
    ForeignDtype {
        /// The file.
        path: PathBuf,
        /// (name, dtype) of each.
        tensors: Vec<(String, String)>,
    },
    /// A tensor was asked for that the file does not have.
    #[error("{} holds no tensor `{name}`", path.display())]
    NoSuchTensor {
        /// The file.
        path: PathBuf,
        /// The name wanted.
        name: String,
    },
    /// A buffer to load a tensor into has another size than the tensor.
    #[error("tensor `{name}` of {}: wanted a buffer of {wanted} bytes, found {found}", path.display())]
    BufferSize {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Bytes of the tensor.
        wanted: u64,
        /// Bytes of the buffer.
        found: u64,
    },
    /// A tensor to save whose bytes do not fit its dtype and shape.
    #[error("tensor `{}`: {} {:?} wants {wanted} bytes, found {found}", info.name, info.dtype, info.shape)]
    TensorSize {
        /// The tensor.
        info: TensorInfo,
        /// Bytes its dtype and shape want.
        wanted: u64,
        /// Bytes given.
        found: u64,
    },
    /// Two tensors of one file have the same name, or one has a name safetensors keeps for itself.
    #[error("tensor names {names:?} are reserved or given twice")]
    TensorNames {
        /// The names.
        names: Vec<String>,
    },
    /// The bytes of a tensor to save could not be had, as from a device that was lost.
    #[error("cannot read tensor `{name}` to save it: {source}")]
    Source {
        /// The tensor.
        name: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The receiver of a tensor's bytes refused them, as a device that was lost does.
    #[error("cannot hand over tensor `{name}` of {}: {source}", path.display())]
    Sink {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
