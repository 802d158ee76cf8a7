//! Memory of a device, memory of the host that a device copies from and to, and the store of parameters and state.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use ash::vk::{self, Handle};

use super::device::{Device, lock};
use super::error::{Result as Made, VulkanError, failed};
use super::hazards::Use;
use crate::Result;
use crate::device_store::{DeviceMemory, DeviceStore};

/// Tensors of at least so many bytes have memory of their own; smaller ones share blocks of [`SHARED`].
const OWN: usize = 8 << 20;
const SHARED: usize = 32 << 20;
/// Tensors in a shared block begin at multiples of this.
const APART: u64 = 256;

/// A place in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) buffer: vk::Buffer,
    pub(crate) offset: u64,
}

impl Region {
    /// So many bytes further on.
    pub(crate) fn after(self, bytes: usize) -> Region {
        Region { offset: self.offset + bytes as u64, ..self }
    }

    /// So many bytes from here on, as used by a command.
    pub(super) fn used(self, bytes: usize, writes: bool) -> Use {
        Use { buffer: self.buffer.as_raw(), from: self.offset, bytes: bytes as u64, writes }
    }
}

/// A buffer with its memory, both of a live device.
struct Raw {
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    bytes: u64,
}

impl Raw {
    fn new(device: &Device, bytes: usize, wanted: &[vk::MemoryPropertyFlags], what: &dyn Fn() -> String) -> Made<Raw> {
        let size = (bytes.max(4) as u64).next_multiple_of(4);
        // More than a device promises to give in one piece is worth a try.
        let too_large = || VulkanError::TooLarge { what: what(), bytes: size, most: device.most_bytes };
        let usage = vk::BufferUsageFlags::STORAGE_BUFFER
            | vk::BufferUsageFlags::TRANSFER_SRC
            | vk::BufferUsageFlags::TRANSFER_DST;
        let info = vk::BufferCreateInfo::default().size(size).usage(usage);
        // SAFETY: a live device, here and below; what is made is destroyed on every way out.
        let buffer = unsafe { device.handle.create_buffer(&info, None) }
            .map_err(|e| if size > device.most_bytes { too_large() } else { failed("vkCreateBuffer")(e) })?;
        device.name_object(buffer, what);
        let memory = Raw::memory(device, buffer, wanted, what).map_err(|e| {
            let lacks = matches!(e, VulkanError::OutOfMemory { free, .. } if free >= size);
            if lacks && size > device.most_bytes { too_large() } else { e }
        });
        if memory.is_err() {
            // SAFETY: made above and used by nothing.
            unsafe { device.handle.destroy_buffer(buffer, None) };
        }
        let (memory, bytes) = memory?;
        device.name_object(memory, what);
        device.allocated.fetch_add(bytes, Ordering::Relaxed);
        Ok(Raw { buffer, memory, bytes })
    }

    /// Memory for a buffer, of the first kind of `wanted` that there is.
    fn memory(
        device: &Device,
        buffer: vk::Buffer,
        wanted: &[vk::MemoryPropertyFlags],
        what: &dyn Fn() -> String,
    ) -> Made<(vk::DeviceMemory, u64)> {
        // SAFETY: a live buffer of the device, here and below.
        let needs = unsafe { device.handle.get_buffer_memory_requirements(buffer) };
        let kinds = device.memories.memory_types_as_slice();
        let fits = |i: usize, flags| needs.memory_type_bits & (1 << i) != 0 && kinds[i].property_flags.contains(flags);
        let kind = wanted.iter().find_map(|&flags| (0..kinds.len()).find(|&i| fits(i, flags)));
        let Some(kind) = kind else {
            return Err(VulkanError::Driver {
                call: "vkGetBufferMemoryRequirements",
                name: "no kind of memory fits".into(),
            });
        };
        let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(kind as u32);
        // SAFETY: as above.
        let memory = match unsafe { device.handle.allocate_memory(&info, None) } {
            Err(vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY) => {
                let (bytes, free, total) = (needs.size, device.free(), device.total);
                return Err(VulkanError::OutOfMemory { what: what(), bytes, free, total });
            }
            other => other.map_err(failed("vkAllocateMemory"))?,
        };
        // SAFETY: both were just made.
        match unsafe { device.handle.bind_buffer_memory(buffer, memory, 0) } {
            Ok(()) => Ok((memory, needs.size)),
            Err(e) => {
                // SAFETY: made above and used by nothing.
                unsafe { device.handle.free_memory(memory, None) };
                Err(failed("vkBindBufferMemory")(e))
            }
        }
    }

    /// Nothing may use it any more.
    unsafe fn free(&self, device: &Device) {
        // SAFETY: as the caller says.
        unsafe {
            device.handle.destroy_buffer(self.buffer, None);
            device.handle.free_memory(self.memory, None);
        }
        device.allocated.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A buffer on the device that one or several tensors lie in.
pub(crate) struct Block {
    device: Arc<Device>,
    raw: Raw,
}

impl Block {
    fn new(device: &Arc<Device>, bytes: usize, what: &dyn Fn() -> String) -> Made<Arc<Block>> {
        let raw = Raw::new(device, bytes, &[vk::MemoryPropertyFlags::DEVICE_LOCAL], what)?;
        Ok(Arc::new(Block { device: Arc::clone(device), raw }))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // What still runs may use it; a device that was lost runs nothing.
        let _ = self.device.wait_all();
        // SAFETY: nothing runs, and nothing else holds the block.
        unsafe { self.raw.free(&self.device) };
    }
}

/// Bytes on a device.
pub(crate) struct Memory {
    block: Arc<Block>,
    offset: u64,
    len: usize,
}

impl Memory {
    /// `len` zero bytes, or an error that says with numbers what `what` lacks.
    pub(crate) fn zeroed(device: &Arc<Device>, len: usize, what: impl Fn() -> String) -> Made<Memory> {
        let memory = if len >= OWN {
            Memory { block: Block::new(device, len, &what)?, offset: 0, len }
        } else {
            Memory::shared(device, len)?
        };
        let mut queue = device.hold();
        let (region, bytes) = (memory.region(), len.max(4));
        device.now(&mut queue, |commands| device.fill(commands, region, 0, bytes))?;
        Ok(memory)
    }

    /// A part of the block that is being filled up, or of a new one.
    fn shared(device: &Arc<Device>, len: usize) -> Made<Memory> {
        let mut current = lock(&device.current);
        let takes = (len.max(4) as u64).next_multiple_of(APART);
        if let (Some(block), used) = (current.0.upgrade(), current.1)
            && used + takes <= SHARED as u64
        {
            current.1 = used + takes;
            return Ok(Memory { block, offset: used, len });
        }
        let block = Block::new(device, SHARED, &|| "a block of small tensors".into())?;
        *current = (Arc::downgrade(&block), takes);
        Ok(Memory { block, offset: 0, len })
    }

    /// Where it begins.
    pub(crate) fn region(&self) -> Region {
        Region { buffer: self.block.raw.buffer, offset: self.offset }
    }

    /// Its length.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// Memory of the host that the device copies from and to.
pub(crate) struct HostMemory {
    /// The device, unless the device itself holds this.
    device: Weak<Device>,
    handle: ash::Device,
    raw: Raw,
    mapped: *mut u8,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for HostMemory {}

impl HostMemory {
    pub(crate) fn new(device: &Arc<Device>, len: usize, what: impl Fn() -> String) -> Made<HostMemory> {
        let coherent = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
        let kinds = [coherent | vk::MemoryPropertyFlags::HOST_CACHED, coherent];
        let raw = Raw::new(device, len, &kinds, &what)?;
        // SAFETY: memory that the host can see, just made and mapped once.
        let mapped = unsafe { device.handle.map_memory(raw.memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty()) };
        let mapped = mapped.map_err(|e| {
            // SAFETY: made above and used by nothing.
            unsafe { raw.free(device) };
            failed("vkMapMemory")(e)
        })?;
        let handle = device.handle.clone();
        Ok(HostMemory { device: Arc::downgrade(device), handle, raw, mapped: mapped.cast(), len })
    }

    pub(crate) fn region(&self) -> Region {
        Region { buffer: self.raw.buffer, offset: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: a mapping of at least so many bytes; the device writes none of them meanwhile, as users wait for it.
        unsafe { std::slice::from_raw_parts(self.mapped, self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.mapped, self.len) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if let Some(device) = self.device.upgrade() {
            let _ = device.wait_all();
            device.allocated.fetch_sub(self.raw.bytes, Ordering::Relaxed);
        }
        // SAFETY: nothing runs that uses it: either it was waited for, or the device itself is being dropped and has waited. The
        // device's handle is destroyed after.
        unsafe {
            self.handle.destroy_buffer(self.raw.buffer, None);
            self.handle.free_memory(self.raw.memory, None);
        }
    }
}

/// Parameters and state on a device.
pub(crate) type VulkanStore = DeviceStore<Memory>;

impl DeviceMemory for Memory {
    type Device = Device;

    fn zeroed(device: &Arc<Device>, bytes: usize, what: impl Fn() -> String) -> Result<Memory> {
        Ok(Memory::zeroed(device, bytes, what)?)
    }

    fn upload(&self, device: &Arc<Device>, at: usize, bytes: &[u8]) -> Result<()> {
        Ok(device.upload(&mut device.hold(), self.region().after(at), bytes)?)
    }

    fn download(&self, device: &Arc<Device>, bytes: &mut [u8]) -> Result<()> {
        Ok(device.download(&mut device.hold(), [(self.region(), bytes)])?)
    }
}
