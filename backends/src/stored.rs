//! Tensors by name, as the store of every backend keeps them; only the memory is the backend's own.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use moebius_ir::{Graph, TensorType, Value};

use crate::{Error, Result};

/// Parameters and state in memory of kind `M`.
pub(crate) struct Stored<M> {
    tensors: BTreeMap<String, (TensorType, M)>,
    /// Changes whenever a tensor may have moved, and is never the same for two stores.
    version: u64,
}

fn next_version() -> u64 {
    static VERSION: AtomicU64 = AtomicU64::new(1);
    VERSION.fetch_add(1, Ordering::Relaxed)
}

impl<M> Stored<M> {
    pub(crate) fn new() -> Self {
        Stored { tensors: BTreeMap::new(), version: next_version() }
    }

    /// A number that stays the same as long as no tensor moved.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Adds a tensor, replacing one of the same name.
    pub(crate) fn insert(&mut self, name: &str, ty: &TensorType, memory: M) {
        self.tensors.insert(name.into(), (ty.clone(), memory));
        self.version = next_version();
    }

    /// Drops a tensor; whether it was there.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        self.version = next_version();
        self.tensors.remove(name).is_some()
    }

    pub(crate) fn ty(&self, name: &str) -> Option<&TensorType> {
        self.tensors.get(name).map(|(ty, _)| ty)
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    /// A tensor's type and memory.
    pub(crate) fn get(&self, name: &str) -> Result<&(TensorType, M)> {
        self.tensors.get(name).ok_or_else(|| self.no_such(name))
    }

    /// A tensor's type and memory, to be written.
    pub(crate) fn get_mut(&mut self, name: &str) -> Result<&mut (TensorType, M)> {
        if !self.tensors.contains_key(name) {
            return Err(self.no_such(name));
        }
        Ok(self.tensors.get_mut(name).unwrap_or_else(|| unreachable!("it was just found")))
    }

    /// The memory of each of `values`, inputs of `graph` that are stored, in the types that the graph wants.
    pub(crate) fn located<'a>(&'a self, graph: &'a Graph, values: &'a [Value]) -> impl Iterator<Item = Result<&'a M>> {
        values.iter().map(|&value| {
            let name = graph.input_of(value).map_or("", |i| &i.name);
            let (wanted, (found, memory)) = (graph.ty(value), self.get(name)?);
            if found != wanted {
                return Err(Error::StoredType { name: name.into(), wanted: wanted.clone(), found: found.clone() });
            }
            Ok(memory)
        })
    }

    fn no_such(&self, name: &str) -> Error {
        Error::NoSuch { what: "stored tensor", name: name.into(), there: self.tensors.keys().cloned().collect() }
    }
}

/// A part of `found` bytes that begins at byte `at` lies inside a tensor of type `ty`.
pub(crate) fn check_part(name: &str, ty: &TensorType, at: usize, found: usize) -> Result<()> {
    if at.checked_add(found).is_some_and(|end| end <= ty.bytes()) {
        return Ok(());
    }
    Err(Error::Part { name: name.into(), ty: ty.clone(), at, found })
}

/// `found` bytes are as many as a tensor of type `ty` has.
pub(crate) fn check_bytes(what: &'static str, name: &str, ty: &TensorType, found: usize) -> Result<()> {
    let wanted = ty.bytes();
    if found == wanted {
        return Ok(());
    }
    Err(Error::Bytes { what, name: name.into(), ty: ty.clone(), wanted, found })
}
