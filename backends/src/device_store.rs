//! Parameters and state in the memory of a GPU: the store of every backend whose host cannot look into that memory.

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use moebius_ir::TensorType;

use crate::stored::{Stored, check_bytes, check_part};
use crate::{Result, Store};

/// Memory of a GPU.
pub(crate) trait DeviceMemory: Send + Sized + 'static {
    /// The GPU.
    type Device: Send + Sync;

    /// `bytes` zero bytes, or an error that says with numbers what `what` lacks.
    fn zeroed(device: &Arc<Self::Device>, bytes: usize, what: impl Fn() -> String) -> Result<Self>;

    /// Copies from the host, from byte `at` on, and waits for it. What is copied fits.
    fn upload(&self, device: &Arc<Self::Device>, at: usize, bytes: &[u8]) -> Result<()>;

    /// Copies as many bytes as there is room for to the host and waits for it.
    fn download(&self, device: &Arc<Self::Device>, bytes: &mut [u8]) -> Result<()>;
}

/// Parameters and state on a GPU.
pub(crate) struct DeviceStore<M: DeviceMemory> {
    device: Arc<M::Device>,
    tensors: Stored<M>,
}

impl<M: DeviceMemory> DeviceStore<M> {
    pub(crate) fn new(device: Arc<M::Device>) -> DeviceStore<M> {
        DeviceStore { device, tensors: Stored::new() }
    }

    /// The tensors.
    pub(crate) fn tensors(&self) -> &Stored<M> {
        &self.tensors
    }

    /// Whether its memory is that of this GPU.
    pub(crate) fn is_on(&self, device: &Arc<M::Device>) -> bool {
        Arc::ptr_eq(&self.device, device)
    }
}

impl<M: DeviceMemory> Store for DeviceStore<M> {
    fn insert(&mut self, name: &str, ty: &TensorType) -> Result<()> {
        let memory = M::zeroed(&self.device, ty.bytes(), || format!("stored tensor {name:?} of type {ty}"))?;
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
        memory.upload(&self.device, 0, bytes)
    }

    fn write_part(&mut self, name: &str, at: usize, bytes: &[u8]) -> Result<()> {
        let (ty, memory) = self.tensors.get(name)?;
        check_part(name, ty, at, bytes.len())?;
        memory.upload(&self.device, at, bytes)
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let (ty, memory) = self.tensors.get(name)?;
        let mut bytes = vec![0; ty.bytes()];
        memory.download(&self.device, &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
