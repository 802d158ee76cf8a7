//! Memory of the CPU backend: aligned buffers and the store of parameters and state.

use std::alloc::{Layout, alloc, dealloc};
use std::any::Any;
use std::borrow::Cow;
use std::ptr::NonNull;

use moebius_ir::TensorType;

use super::BACKEND;
use crate::stored::{Stored, check_bytes, check_part};
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
pub(crate) struct CpuStore(Stored<Buffer>);

impl CpuStore {
    pub(crate) fn new() -> Self {
        CpuStore(Stored::new())
    }

    /// The tensors.
    pub(crate) fn tensors(&self) -> &Stored<Buffer> {
        &self.0
    }
}

impl Store for CpuStore {
    fn insert(&mut self, name: &str, ty: &TensorType) -> Result<()> {
        let buffer = Buffer::zeroed(ty.bytes(), || format!("stored tensor {name:?} of type {ty}"))?;
        self.0.insert(name, ty, buffer);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name)
    }

    fn ty(&self, name: &str) -> Option<&TensorType> {
        self.0.ty(name)
    }

    fn names(&self) -> Vec<&str> {
        self.0.names()
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (ty, buffer) = self.0.get_mut(name)?;
        copy("stored tensor", name, ty, bytes, buffer.bytes_mut())
    }

    fn write_part(&mut self, name: &str, at: usize, bytes: &[u8]) -> Result<()> {
        let (ty, buffer) = self.0.get_mut(name)?;
        check_part(name, ty, at, bytes.len())?;
        buffer.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        Ok(Cow::Borrowed(self.0.get(name)?.1.bytes()))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Copies bytes that must fill a tensor of type `ty`.
pub(crate) fn copy(what: &'static str, name: &str, ty: &TensorType, from: &[u8], to: &mut [u8]) -> Result<()> {
    check_bytes(what, name, ty, from.len())?;
    check_bytes(what, name, ty, to.len())?;
    to.copy_from_slice(from);
    Ok(())
}
