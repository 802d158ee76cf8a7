//! Memory of the CPU backend: aligned buffers and the store of parameters and state.

use std::alloc::{Layout, alloc, dealloc};
use std::any::Any;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use moebius_ir::TensorType;

use super::BACKEND;
use crate::{Error, Result, Store};

/// Zero-initialised bytes at a multiple of [`Buffer::ALIGN`].
pub(crate) struct Buffer {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a Buffer owns its memory like a Vec<u8> does; sharing and sending follow the usual borrow rules.
unsafe impl Send for Buffer {}
// SAFETY: as above; &Buffer gives only shared access.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A cache line on every machine we know, and wide enough for any vector load.
    pub(crate) const ALIGN: usize = 128;

    /// Memory from this size on is asked for in huge pages: weights are streamed through, and with small pages a core
    /// spends much of that time looking addresses up.
    const HUGE_FROM: usize = 1 << 20;
    /// Size of a huge page on x86-64 and most of AArch64.
    const HUGE_PAGE: usize = 2 << 20;

    fn layout(len: usize) -> Option<Layout> {
        let align = if len >= Self::HUGE_FROM { Self::HUGE_PAGE } else { Self::ALIGN };
        Layout::from_size_align(len.max(1), align).ok().map(|l| l.pad_to_align())
    }

    /// Tells the system that this memory may lie in huge pages; only a hint.
    fn hint(start: NonNull<u8>, layout: Layout) {
        #[cfg(target_os = "linux")]
        if layout.align() == Self::HUGE_PAGE {
            // SAFETY: whole pages that were just allocated with this layout; the call changes no content.
            unsafe { libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (start, layout);
    }

    /// `len` zero bytes, or an error naming `what` they are for.
    pub(crate) fn zeroed(len: usize, what: impl FnOnce() -> String) -> Result<Buffer> {
        let Some(layout) = Self::layout(len) else {
            return Err(Error::OutOfMemory { backend: BACKEND, what: what(), bytes: len });
        };
        // The hint must come before the first touch, so the zeroes are written here and not by the allocator.
        // SAFETY: the layout's size is at least 1.
        let Some(start) = NonNull::new(unsafe { alloc(layout) }) else {
            return Err(Error::OutOfMemory { backend: BACKEND, what: what(), bytes: len });
        };
        Self::hint(start, layout);
        // SAFETY: `layout.size()` bytes were allocated.
        unsafe { start.as_ptr().write_bytes(0, layout.size()) };
        Ok(Buffer { start, len })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes from `start` are initialised and owned by self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated in `zeroed` with this very layout.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

/// Parameters and state of the CPU backend.
pub(crate) struct CpuStore {
    tensors: BTreeMap<String, (TensorType, Buffer)>,
    /// Changes whenever a tensor may have moved, and is never the same for two stores.
    version: u64,
}

fn next_version() -> u64 {
    static VERSION: AtomicU64 = AtomicU64::new(1);
    VERSION.fetch_add(1, Ordering::Relaxed)
}

impl CpuStore {
    pub(crate) fn new() -> Self {
        CpuStore { tensors: BTreeMap::new(), version: next_version() }
    }

    /// A number that stays the same as long as no tensor moved.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// The memory of a tensor that must have this type.
    pub(crate) fn locate(&self, name: &str, wanted: &TensorType) -> Result<*mut u8> {
        let (ty, buffer) = self.tensors.get(name).ok_or_else(|| self.no_such(name))?;
        if ty != wanted {
            return Err(Error::StoredType { name: name.into(), wanted: wanted.clone(), found: ty.clone() });
        }
        Ok(buffer.as_ptr())
    }

    fn no_such(&self, name: &str) -> Error {
        Error::NoSuch { what: "stored tensor", name: name.into(), there: self.tensors.keys().cloned().collect() }
    }
}

impl Store for CpuStore {
    fn insert(&mut self, name: &str, ty: &TensorType) -> Result<()> {
        let buffer = Buffer::zeroed(ty.bytes(), || format!("stored tensor {name:?} of type {ty}"))?;
        self.tensors.insert(name.into(), (ty.clone(), buffer));
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
        let missing = self.no_such(name);
        let (ty, buffer) = self.tensors.get_mut(name).ok_or(missing)?;
        copy("stored tensor", name, ty, bytes, buffer.bytes_mut())
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let (_, buffer) = self.tensors.get(name).ok_or_else(|| self.no_such(name))?;
        Ok(Cow::Borrowed(buffer.bytes()))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Copies bytes that must fill a tensor of type `ty`.
pub(crate) fn copy(what: &'static str, name: &str, ty: &TensorType, from: &[u8], to: &mut [u8]) -> Result<()> {
    let wanted = ty.bytes();
    let found = if from.len() == wanted { to.len() } else { from.len() };
    if found != wanted {
        return Err(Error::Bytes { what, name: name.into(), ty: ty.clone(), wanted, found });
    }
    to.copy_from_slice(from);
    Ok(())
}
