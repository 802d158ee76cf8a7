//! Memory of a GPU, and the store of parameters and state in it.

use std::sync::Arc;

use cust::sys;

use super::device::Device;
use super::driver::check;
use super::error::CudaError;
use crate::Result;
use crate::device_store::{DeviceMemory, DeviceStore};

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
pub(crate) type CudaStore = DeviceStore<Memory>;

impl DeviceMemory for Memory {
    type Device = Device;

    fn zeroed(device: &Arc<Device>, bytes: usize, what: impl Fn() -> String) -> Result<Memory> {
        Memory::zeroed(device, bytes, what)
    }

    fn upload(&self, device: &Arc<Device>, at: usize, bytes: &[u8]) -> Result<()> {
        device.enter()?;
        let _held = device.hold();
        Ok(device.upload(self.start + at as u64, bytes)?)
    }

    fn download(&self, device: &Arc<Device>, bytes: &mut [u8]) -> Result<()> {
        device.enter()?;
        let _held = device.hold();
        Ok(device.download(self.start, bytes)?)
    }
}
