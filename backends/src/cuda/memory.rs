//! Memory of a GPU, and the store of parameters and state in it.

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use cust::sys;
use moebius_ir::TensorType;

use super::device::Device;
use super::driver::check;
use super::error::CudaError;
use crate::stored::{Stored, check_bytes, check_part};
use crate::{Result, Store};

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
    tensors: Stored<Memory>,
}

impl CudaStore {
    pub(crate) fn new(device: Arc<Device>) -> CudaStore {
        CudaStore { device, tensors: Stored::new() }
    }

    /// The tensors.
    pub(crate) fn tensors(&self) -> &Stored<Memory> {
        &self.tensors
    }

    /// Whether its memory is that of this GPU.
    pub(crate) fn is_on(&self, device: &Arc<Device>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }
}

impl Store for CudaStore {
    fn insert(&mut self, name: &str, ty: &TensorType) -> Result<()> {
        let memory = Memory::zeroed(&self.device, ty.bytes(), || format!("stored tensor {name:?} of type {ty}"))?;
        self.tensors.insert(name, ty, memory);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> bool {
        self.tensors.remove(name)
    }

    fn ty(&self, name: &str) -> Option<&TensorType> {
        self.tensors.ty(name)
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.names()
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (ty, memory) = self.tensors.get(name)?;
        check_bytes("stored tensor", name, ty, bytes.len())?;
        self.device.enter()?;
        let _held = self.device.hold();
        Ok(self.device.upload(memory.start(), bytes)?)
    }

    fn write_part(&mut self, name: &str, at: usize, bytes: &[u8]) -> Result<()> {
        let (ty, memory) = self.tensors.get(name)?;
        check_part(name, ty, at, bytes.len())?;
        self.device.enter()?;
        let _held = self.device.hold();
        Ok(self.device.upload(memory.start() + at as u64, bytes)?)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let (ty, memory) = self.tensors.get(name)?;
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
