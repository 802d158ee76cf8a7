//! Memory of a GPU, and the store of parameters and state in it.

use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cust::sys;
use moebius_ir::TensorType;

use super::device::Device;
use super::driver::check;
use super::error::CudaError;
use crate::{Error, Result, Store};

/// Bytes on a GPU.
pub(crate) struct Memory {
    device: Arc<Device>,
    start: u64,
    len: usize,
}

impl Memory {
    /// `len` zero bytes, or an error that says with numbers what `what` lacks.
    pub(crate) fn zeroed(device: &Arc<Device>, len: usize, what: impl FnOnce() -> String) -> Result<Memory> {
        device.enter()?;
        let mut start = 0;
        // SAFETY: the pointer is valid, and a size of 0 is not asked for.
        let result = unsafe { sys::cuMemAlloc_v2(&mut start, len.max(1)) };
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (bytes, free) = (len as u64, device.free()?);
            return Err(CudaError::OutOfMemory { what: what(), bytes, free, total: device.total }.into());
        }
        check("cuMemAlloc", result)?;
        let memory = Memory { device: Arc::clone(device), start, len };
        // Nobody may be recording the stream meanwhile.
        let _held = device.hold();
        device.fill(start, 0, len)?;
        Ok(memory)
    }

    /// Its address.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Its length.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: allocated in `zeroed`; the call waits for what is still running on it. A failure leaves nothing to do.
            let _ = unsafe { sys::cuMemFree_v2(self.start) };
        }
    }
}

/// Parameters and state on a GPU.
pub(crate) struct CudaStore {
    device: Arc<Device>,
    tensors: BTreeMap<String, (TensorType, Memory)>,
    /// Changes whenever a tensor may have moved, and is never the same for two stores.
    version: u64,
}

fn next_version() -> u64 {
    static VERSION: AtomicU64 = AtomicU64::new(1);
    VERSION.fetch_add(1, Ordering::Relaxed)
}

impl CudaStore {
    pub(crate) fn new(device: Arc<Device>) -> CudaStore {
        CudaStore { device, tensors: BTreeMap::new(), version: next_version() }
    }

    /// A number that stays the same as long as no tensor moved.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Whether its memory is that of this GPU.
    pub(crate) fn is_on(&self, device: &Arc<Device>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }

    /// The address of a tensor that must have this type.
    pub(crate) fn locate(&self, name: &str, wanted: &TensorType) -> Result<u64> {
        let (ty, memory) = self.tensors.get(name).ok_or_else(|| self.no_such(name))?;
        if ty != wanted {
            return Err(Error::StoredType { name: name.into(), wanted: wanted.clone(), found: ty.clone() });
        }
        Ok(memory.start())
    }

    fn no_such(&self, name: &str) -> Error {
        Error::NoSuch { what: "stored tensor", name: name.into(), there: self.tensors.keys().cloned().collect() }
    }
}

impl Store for CudaStore {
    fn insert(&mut self, name: &str, ty: &TensorType) -> Result<()> {
        let memory = Memory::zeroed(&self.device, ty.bytes(), || format!("stored tensor {name:?} of type {ty}"))?;
        self.tensors.insert(name.into(), (ty.clone(), memory));
        self.version = next_version();
        Ok(())
    }

    fn remove(&mut self, name: &str) -> bool {
        self.version = next_version();
        self.tensors.remove(name).is_some()
    }

    fn ty(&self, name: &str) -> Option<&TensorType> {
        self.tensors.get(name).map(|(ty, _)| ty)
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (ty, memory) = self.tensors.get(name).ok_or_else(|| self.no_such(name))?;
        check_bytes("stored tensor", name, ty, bytes.len())?;
        self.device.enter()?;
        let _held = self.device.hold();
        Ok(self.device.upload(memory.start(), bytes)?)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let (ty, memory) = self.tensors.get(name).ok_or_else(|| self.no_such(name))?;
        let mut bytes = vec![0; ty.bytes()];
        self.device.enter()?;
        let _held = self.device.hold();
        self.device.download(memory.start(), &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// A buffer of `found` bytes is that of a tensor of type `ty`.
pub(crate) fn check_bytes(what: &'static str, name: &str, ty: &TensorType, found: usize) -> Result<()> {
    let wanted = ty.bytes();
    if found == wanted {
        return Ok(());
    }
    Err(Error::Bytes { what, name: name.into(), ty: ty.clone(), wanted, found })
}
