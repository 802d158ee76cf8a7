//! Writes a safetensors file tensor by tensor, hashing on the way.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::tensor::TensorInfo as Entry;
use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};
use xxhash_rust::xxh3::Xxh3;

use super::{
    disk::OutFile,
    error::CheckpointError,
    tensors::{Tensor, TensorInfo},
};

/// Bytes hashed and then written at a time: what was just hashed is still in the cache when the system copies it.
pub(super) const CHUNK: usize = 1 << 20;

/// What a file holds, as `state.json` keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct FileRecord {
    /// Bytes of the file.
    pub(super) length: u64,
    /// xxh3-128 of the whole file, the value `xxhsum -H2` prints.
    pub(super) xxh3: String,
    /// xxh3-128 of all bytes before the first tensor.
    pub(super) header_xxh3: String,
    /// xxh3-128 of each tensor's bytes. Header and tensors together cover every byte of the file.
    pub(super) tensors: BTreeMap<String, String>,
}

pub(super) fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

/// The JSON header of a safetensors file in the order of the file, so that equal tensors make equal bytes.
struct Header<'a> {
    metadata: &'a BTreeMap<String, String>,
    entries: Vec<(&'a str, Entry)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", self.metadata)?;
        }
        for (name, entry) in &self.entries {
            map.serialize_entry(name, entry)?;
        }
        map.end()
    }
}

/// The bytes before the first tensor: length and JSON, padded with spaces so that the tensors begin at a multiple of 8.
fn header(
    out: &OutFile<'_>,
    metadata: &BTreeMap<String, String>,
    infos: &[(&TensorInfo, u64)],
) -> Result<Vec<u8>, CheckpointError> {
    let mut end = 0;
    let entries = infos
        .iter()
        .map(|(info, bytes)| {
            let start = end;
            end += *bytes as usize;
            let dtype = info.dtype.to_safetensors();
            (info.name.as_str(), Entry { dtype, shape: info.shape.clone(), data_offsets: (start, end) })
        })
        .collect();
    let mut bytes = vec![0; 8];
    serde_json::to_writer(&mut bytes, &Header { metadata, entries })
        .map_err(|source| CheckpointError::Json { path: out.path().to_path_buf(), source })?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let length = (bytes.len() - 8) as u64;
    bytes[..8].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// Writes all tensors, those of wide elements first: safetensors wants no gaps, and so every tensor is still aligned to
/// its elements. Within one width the order given is kept.
pub(super) fn write_tensors(
    mut out: OutFile<'_>,
    metadata: &BTreeMap<String, String>,
    mut tensors: Vec<Tensor<'_>>,
) -> Result<FileRecord, CheckpointError> {
    tensors.sort_by_key(|t| std::cmp::Reverse(t.info().dtype.size()));
    let mut seen = BTreeSet::new();
    let bad: BTreeSet<&String> =
        tensors.iter().map(|t| &t.info().name).filter(|n| *n == "__metadata__" || !seen.insert(*n)).collect();
    if !bad.is_empty() {
        return Err(CheckpointError::TensorNames { names: bad.into_iter().cloned().collect() });
    }
    let mut sized = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        let info = tensor.info();
        let bytes = info.bytes().ok_or_else(|| CheckpointError::TensorSize {
            info: info.clone(),
            wanted: u64::MAX,
            found: 0,
        })?;
        sized.push((info, bytes));
    }
    let head = header(&out, metadata, &sized)?;

    let mut whole = Xxh3::new();
    let mut length = head.len() as u64;
    whole.update(&head);
    out.write(&head)?;
    let mut record = FileRecord {
        length: 0,
        xxh3: String::new(),
        header_xxh3: hex(xxhash_rust::xxh3::xxh3_128(&head)),
        tensors: BTreeMap::new(),
    };
    // Small tensors are gathered here so that each does not cost a system call of its own.
    let mut gathered: Vec<u8> = Vec::new();
    for tensor in tensors {
        let (info, produce) = tensor.into_parts();
        let bytes = produce().map_err(|source| CheckpointError::Source { name: info.name.clone(), source })?;
        let wanted = info.bytes().unwrap_or(u64::MAX);
        if bytes.len() as u64 != wanted {
            return Err(CheckpointError::TensorSize { info, wanted, found: bytes.len() as u64 });
        }
        let mut own = Xxh3::new();
        for chunk in bytes.chunks(CHUNK) {
            own.update(chunk);
            whole.update(chunk);
            if gathered.len() + chunk.len() > CHUNK {
                out.write(&gathered)?;
                gathered.clear();
            }
            if chunk.len() == CHUNK {
                out.write(chunk)?;
            } else {
                gathered.extend_from_slice(chunk);
            }
        }
        length += wanted;
        record.tensors.insert(info.name, hex(own.digest128()));
    }
    if !gathered.is_empty() {
        out.write(&gathered)?;
    }
    out.finish()?;
    record.length = length;
    record.xxh3 = hex(whole.digest128());
    Ok(record)
}
