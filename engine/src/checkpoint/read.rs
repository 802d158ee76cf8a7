//! Reads safetensors files tensor by tensor, checking what is read against the hashes it was written with.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use safetensors::tensor::Metadata;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::{
    disk::io_error,
    error::{CheckpointError, Damage, DamagedTensor, Mismatch, Operation},
    tensors::{Dtype, TensorInfo},
    write::{CHUNK, FileRecord, hex},
};

/// safetensors' own limit, so that a damaged length cannot ask for all memory.
const HEADER_LIMIT: u64 = 100_000_000;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// Takes (offset, bytes).
type Sink<'s> = dyn FnMut(u64, &[u8]) -> Result<(), BoxError> + 's;

/// A safetensors file open for reading. Only its header is in memory.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    /// In the order of the file, with the first byte of each from the start of the file.
    tensors: Vec<(TensorInfo, u64)>,
    index: BTreeMap<String, usize>,
    metadata: BTreeMap<String, String>,
    hashes: Option<BTreeMap<String, String>>,
}

impl TensorFile {
    /// Opens any safetensors file, for instance exported weights. Such a file carries no hashes: only its length and its
    /// header can be checked.
    ///
    /// # Errors
    /// `Io`; `NotSafetensors` and `HeaderLength` for another kind of file; `Damaged` when the length is not what the header
    /// says; `ForeignDtype` naming all tensors of dtypes the engine does not have.
    pub fn open(path: impl AsRef<Path>) -> Result<TensorFile, CheckpointError> {
        Self::open_with(path.as_ref(), None)
    }

    /// Opens a file of a checkpoint. Its length and header are checked now, each tensor when it is read.
    pub(super) fn open_with(path: &Path, record: Option<&FileRecord>) -> Result<TensorFile, CheckpointError> {
        let damaged = |damage| CheckpointError::Damaged { path: path.to_path_buf(), damage };
        let mut file = match File::open(path) {
            Err(e) if record.is_some() && e.kind() == std::io::ErrorKind::NotFound => {
                return Err(damaged(Damage::Absent));
            }
            opened => opened.map_err(io_error(Operation::Open, path))?,
        };
        let found = file.metadata().map_err(io_error(Operation::Open, path))?.len();
        if let Some(record) = record.filter(|r| r.length != found) {
            return Err(damaged(Damage::Length { wanted: record.length, found }));
        }
        let mut head = vec![0; 8.min(found) as usize];
        file.read_exact(&mut head).map_err(io_error(Operation::Read, path))?;
        let stated = head.as_slice().try_into().map_or(0, u64::from_le_bytes);
        let limit = HEADER_LIMIT.min(found.saturating_sub(8));
        if stated < 2 || stated > limit {
            return Err(match record {
                Some(record) => {
                    damaged(Damage::Header { wanted: record.header_xxh3.clone(), found: hex(xxh3_128(&head)) })
                }
                None => CheckpointError::HeaderLength { path: path.to_path_buf(), limit, found: stated, file: found },
            });
        }
        head.resize(8 + stated as usize, 0);
        file.read_exact(&mut head[8..]).map_err(io_error(Operation::Read, path))?;
        if let Some(record) = record {
            let found = hex(xxh3_128(&head));
            if found != record.header_xxh3 {
                return Err(damaged(Damage::Header { wanted: record.header_xxh3.clone(), found }));
            }
        }
        let header: Metadata = serde_json::from_slice(&head[8..])
            .map_err(|source| CheckpointError::NotSafetensors { path: path.to_path_buf(), source })?;
        // Saturating: offsets near the end of 64 bits are possible in a foreign header, and then the length differs anyway.
        let wanted = (head.len() as u64).saturating_add(header.data_len() as u64);
        if wanted != found {
            return Err(damaged(Damage::Length { wanted, found }));
        }
        let mut tensors = Vec::new();
        let mut foreign = Vec::new();
        for name in header.offset_keys() {
            let Some(entry) = header.info(&name) else { continue };
            match Dtype::from_safetensors(entry.dtype) {
                Some(dtype) => {
                    let start = head.len() as u64 + entry.data_offsets.0 as u64;
                    tensors.push((TensorInfo { name, dtype, shape: entry.shape.clone() }, start));
                }
                None => foreign.push((name, format!("{:?}", entry.dtype))),
            }
        }
        if !foreign.is_empty() {
            return Err(CheckpointError::ForeignDtype { path: path.to_path_buf(), tensors: foreign });
        }
        let index = tensors.iter().enumerate().map(|(i, (t, _))| (t.name.clone(), i)).collect();
        let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
        let hashes = record.map(|r| r.tensors.clone());
        Ok(TensorFile { path: path.to_path_buf(), file, tensors, index, metadata, hashes })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text pairs the file carries beside its tensors, such as `format` and `config`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter().map(|(info, _)| info)
    }

    /// The tensor of that name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i].0)
    }

    /// Checks that the file holds exactly the tensors `wanted`, in any order.
    ///
    /// # Errors
    /// `Mismatch` with every missing, unexpected and different tensor.
    pub fn expect<'a>(&self, wanted: impl IntoIterator<Item = &'a TensorInfo>) -> Result<(), CheckpointError> {
        let mut mismatch = Mismatch::default();
        let mut left = self.index.clone();
        for want in wanted {
            left.remove(&want.name);
            match self.info(&want.name) {
                None => mismatch.missing.push(want.clone()),
                Some(found) if found != want => mismatch.different.push((want.clone(), found.clone())),
                Some(_) => {}
            }
        }
        mismatch.unexpected = left.values().map(|&i| self.tensors[i].0.clone()).collect();
        if mismatch.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Mismatch { path: self.path.clone(), mismatch: Box::new(mismatch) })
    }

    fn find(&self, name: &str) -> Result<usize, CheckpointError> {
        let unknown = || CheckpointError::NoSuchTensor { path: self.path.clone(), name: name.to_string() };
        self.index.get(name).copied().ok_or_else(unknown)
    }

    fn seek(&mut self, i: usize) -> Result<u64, CheckpointError> {
        let (info, start) = &self.tensors[i];
        self.file.seek(SeekFrom::Start(*start)).map_err(io_error(Operation::Read, &self.path))?;
        // The header was accepted, and safetensors accepts no tensor whose size overflows.
        Ok(info.bytes().unwrap_or(0))
    }

    fn check(&self, i: usize, hash: &Xxh3) -> Option<DamagedTensor> {
        let hashes = self.hashes.as_ref()?;
        let name = &self.tensors[i].0.name;
        let found = hex(hash.digest128());
        let wanted = hashes.get(name).cloned().unwrap_or_default();
        (wanted != found).then(|| DamagedTensor { name: name.clone(), wanted, found })
    }

    fn damaged(&self, tensors: Vec<DamagedTensor>) -> CheckpointError {
        CheckpointError::Damaged { path: self.path.clone(), damage: Damage::Tensors(tensors) }
    }

    /// Reads a tensor's little-endian bytes into `buffer`, which must have exactly its size.
    ///
    /// # Errors
    /// `NoSuchTensor`, `BufferSize`, `Io`; `Damaged` when the bytes are not those that were written: they are in `buffer`
    /// nevertheless and must not be used.
    pub fn load_into(&mut self, name: &str, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        let i = self.find(name)?;
        let wanted = self.seek(i)?;
        if buffer.len() as u64 != wanted {
            return Err(CheckpointError::BufferSize {
                path: self.path.clone(),
                name: name.to_string(),
                wanted,
                found: buffer.len() as u64,
            });
        }
        let mut hash = Xxh3::new();
        for chunk in buffer.chunks_mut(CHUNK) {
            self.file.read_exact(chunk).map_err(io_error(Operation::Read, &self.path))?;
            if self.hashes.is_some() {
                hash.update(chunk);
            }
        }
        self.check(i, &hash).map_or(Ok(()), |d| Err(self.damaged(vec![d])))
    }

    /// Hands a tensor's little-endian bytes to `sink(offset, bytes)` in pieces of at most 1 MiB, so that a tensor for a
    /// device never lies in memory whole.
    ///
    /// # Errors
    /// As `load_into`; `Sink` with what `sink` returned. When `Damaged` is returned the bytes handed over must not be used.
    pub fn load_chunks(
        &mut self,
        name: &str,
        mut sink: impl FnMut(u64, &[u8]) -> Result<(), BoxError>,
    ) -> Result<(), CheckpointError> {
        let i = self.find(name)?;
        match self.stream(i, &mut sink)? {
            None => Ok(()),
            Some(damage) => Err(self.damaged(vec![damage])),
        }
    }

    fn stream(&mut self, i: usize, sink: &mut Sink<'_>) -> Result<Option<DamagedTensor>, CheckpointError> {
        let bytes = self.seek(i)?;
        let mut buffer = vec![0; bytes.min(CHUNK as u64) as usize];
        let mut hash = Xxh3::new();
        let mut offset = 0;
        while offset < bytes {
            let chunk = &mut buffer[..(bytes - offset).min(CHUNK as u64) as usize];
            self.file.read_exact(chunk).map_err(io_error(Operation::Read, &self.path))?;
            hash.update(chunk);
            sink(offset, chunk).map_err(|source| CheckpointError::Sink {
                path: self.path.clone(),
                name: self.tensors[i].0.name.clone(),
                source,
            })?;
            offset += chunk.len() as u64;
        }
        Ok(self.check(i, &hash))
    }

    /// Reads the whole file and compares every tensor with the hash it was written with. A file without hashes passes.
    ///
    /// # Errors
    /// `Io`; `Damaged` naming all damaged tensors.
    pub fn verify(&mut self) -> Result<(), CheckpointError> {
        let mut damaged = Vec::new();
        for i in 0..self.tensors.len() {
            damaged.extend(self.stream(i, &mut |_, _| Ok(()))?);
        }
        if damaged.is_empty() { Ok(()) } else { Err(self.damaged(damaged)) }
    }
}
