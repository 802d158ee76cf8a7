//! One device: its queue, on which everything happens in order, and what is copied to and from the host.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ash::vk::{self, Handle};

use super::error::{Result, VulkanError, failed};
use super::hazards::Barrier;
use super::limits::Limits;
use super::loader::{self, Choice, Loader};
use super::matrices::{Bf16Features, Matrices};
use super::memory::{Block, HostMemory, Region};
use super::pipelines::Pipelines;
use crate::cache::Cache;

/// The least version of Vulkan: the first with timeline semaphores.
const VERSION: u32 = vk::API_VERSION_1_2;
/// Bytes of the values that a kernel is given beside its buffers.
pub(crate) const NUMBER_BYTES: u32 = 128;
/// What parts of memory that kernels are given begin at multiples of, as the plan does.
pub(crate) const ALIGNMENT: u64 = 128;
/// Bytes that are copied to or from the host at a time.
const STAGING: usize = 16 << 20;

/// A device with a queue.
pub(crate) struct Device {
    pub(crate) loader: &'static Loader,
    pub(crate) physical: vk::PhysicalDevice,
    pub(crate) handle: ash::Device,
    /// Its number, from 0.
    pub(crate) ordinal: usize,
    pub(crate) name: String,
    /// What the driver says of itself.
    pub(crate) driver: String,
    /// Version of Vulkan.
    pub(crate) version: u32,
    /// It is a card of its own.
    pub(crate) discrete: bool,
    pub(crate) limits: Limits,
    /// Bytes of its memory.
    pub(crate) total: u64,
    pub(crate) memories: vk::PhysicalDeviceMemoryProperties,
    /// The most bytes of one allocation.
    pub(crate) most_bytes: u64,
    pub(crate) pipelines: Pipelines,
    /// Seconds of one step of its clock, if the queue has one.
    pub(crate) clock: Option<f64>,
    budget: bool,
    names: Option<ash::ext::debug_utils::Device>,
    pub(crate) family: u32,
    queue: Mutex<Queue>,
    /// Counts submissions: it reaches the number of each when that is done.
    timeline: vk::Semaphore,
    /// The number of the last submission.
    submitted: AtomicU64,
    /// The block that small tensors are put into, and how much of it is used.
    pub(crate) current: Mutex<(Weak<Block>, u64)>,
    pub(crate) allocated: AtomicU64,
    notes: Mutex<Vec<String>>,
}

/// The queue, with what is used of it in turn.
pub(crate) struct Queue {
    handle: vk::Queue,
    pool: vk::CommandPool,
    /// For what is waited for at once.
    once: vk::CommandBuffer,
    staging: Option<HostMemory>,
}

/// A mutex that a panic elsewhere does not make useless: what it guards is replaced whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The family of queues to compute on: the first that does not draw, whose runs begin sooner on some devices, or else the first that
/// computes.
fn family(loader: &Loader, physical: vk::PhysicalDevice) -> Option<(u32, u32)> {
    // SAFETY: a device of this instance.
    let families = unsafe { loader.instance.get_physical_device_queue_family_properties(physical) };
    let can = |f: &vk::QueueFamilyProperties, what| f.queue_flags.contains(what);
    let computes = |f: &vk::QueueFamilyProperties| can(f, vk::QueueFlags::COMPUTE);
    let alone = families.iter().position(|f| computes(f) && !can(f, vk::QueueFlags::GRAPHICS));
    let at = alone.or_else(|| families.iter().position(computes))?;
    Some((at as u32, families[at].timestamp_valid_bits))
}

fn spelled(version: u32) -> String {
    format!("{}.{}", vk::api_version_major(version), vk::api_version_minor(version))
}

impl Device {
    /// The device that is wanted, with its kernels kept in `cache`; with the validation layer if `validated`.
    pub(crate) fn open(choice: &Choice, validated: bool, cache: Cache) -> Result<Device> {
        let loader = loader::load(validated)?;
        let shown = loader.choose(choice)?;
        let (physical, name, instance) = (shown.physical, shown.name, &loader.instance);
        let old = |wanted: String, found: String| VulkanError::OldDevice { name: name.clone(), wanted, found };

        let mut maintenance = vk::PhysicalDeviceMaintenance3Properties::default();
        let mut subgroups = vk::PhysicalDeviceSubgroupProperties::default();
        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut floats = vk::PhysicalDeviceFloatControlsProperties::default();
        let mut properties = vk::PhysicalDeviceProperties2::default()
            .push_next(&mut floats)
            .push_next(&mut maintenance)
            .push_next(&mut subgroups)
            .push_next(&mut driver);
        // SAFETY: a device of this instance; the structures outlive the call.
        unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
        let properties = properties.properties;
        let preserve = floats.shader_signed_zero_inf_nan_preserve_float32 == vk::TRUE;
        if properties.api_version < VERSION {
            return Err(old(
                format!("Vulkan {}", spelled(VERSION)),
                format!("Vulkan {}", spelled(properties.api_version)),
            ));
        }
        let (mut v11, mut v12) =
            (vk::PhysicalDeviceVulkan11Features::default(), vk::PhysicalDeviceVulkan12Features::default());
        let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut v11).push_next(&mut v12);
        // SAFETY: as above.
        unsafe { instance.get_physical_device_features2(physical, &mut features) };
        let int16 = features.features.shader_int16 == vk::TRUE;
        if v12.timeline_semaphore == vk::FALSE {
            return Err(old("timeline semaphores".into(), "none".into()));
        }
        let l = properties.limits;
        if l.min_storage_buffer_offset_alignment > ALIGNMENT {
            let found = format!("buffers at multiples of {}", l.min_storage_buffer_offset_alignment);
            return Err(old(format!("of {ALIGNMENT} bytes"), found));
        }
        for (what, wanted, found) in [
            ("threads of a workgroup", Limits::LEAST.threads as u32, l.max_compute_work_group_invocations),
            ("bytes of shared memory", Limits::LEAST.shared as u32, l.max_compute_shared_memory_size),
            ("bytes of push constants", NUMBER_BYTES, l.max_push_constants_size),
            ("storage buffers", Limits::LEAST.buffers as u32, l.max_per_stage_descriptor_storage_buffers),
        ] {
            if found < wanted {
                return Err(old(format!("at least {wanted}"), format!("{found} {what}")));
            }
        }
        // SAFETY: a device of this instance.
        let extensions = unsafe { instance.enumerate_device_extension_properties(physical) };
        let extensions = extensions.map_err(failed("vkEnumerateDeviceExtensionProperties"))?;
        let has = |name: &std::ffi::CStr| extensions.iter().any(|e| e.extension_name_as_c_str() == Ok(name));
        let young = properties.api_version >= vk::API_VERSION_1_3;
        let matrices =
            if young { Matrices::of(loader, physical, subgroups.subgroup_size, has) } else { Matrices::default() };
        let limits = Limits {
            halves: int16 && v11.storage_buffer16_bit_access == vk::TRUE,
            groups: l.max_compute_work_group_count.into_iter().min().unwrap_or(0) as usize,
            shared: l.max_compute_shared_memory_size as usize,
            buffers: l.max_per_stage_descriptor_storage_buffers as usize,
            range: l.max_storage_buffer_range as usize,
            processor: shown.kind == vk::PhysicalDeviceType::CPU,
            threads: l.max_compute_work_group_invocations.min(l.max_compute_work_group_size[0]) as usize,
            subgroup: subgroups.subgroup_size as usize,
            shuffles: subgroups.subgroup_size == 32
                && subgroups.supported_stages.contains(vk::ShaderStageFlags::COMPUTE)
                && subgroups.supported_operations.contains(vk::SubgroupFeatureFlags::SHUFFLE),
            matrices_bf16: matrices.bf16,
            matrices_f16: matrices.f16,
        };
        let (family, clock_bits) =
            family(loader, physical).ok_or_else(|| old("a queue that computes".into(), "none".into()))?;

        let budget = has(ash::ext::memory_budget::NAME);
        let budgets = budget.then_some(ash::ext::memory_budget::NAME);
        let wanted: Vec<_> = budgets.into_iter().chain(matrices.extensions()).map(|name| name.as_ptr()).collect();
        // Only what the kernels use.
        let mut v11 = vk::PhysicalDeviceVulkan11Features::default().storage_buffer16_bit_access(limits.halves);
        let mut v12 = vk::PhysicalDeviceVulkan12Features::default()
            .timeline_semaphore(true)
            .shader_float16(matrices.f16)
            .vulkan_memory_model(matrices.any())
            .vulkan_memory_model_device_scope(matrices.any());
        let mut of_bf16 = Bf16Features::new(true);
        let mut of_matrices = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default().cooperative_matrix(true);
        let features = vk::PhysicalDeviceFeatures::default().shader_int16(limits.halves);
        let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
        let mut info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&wanted)
            .enabled_features(&features)
            .push_next(&mut v11)
            .push_next(&mut v12);
        if matrices.any() {
            info = info.push_next(&mut of_matrices);
        }
        if matrices.bf16 {
            info = info.push_next(&mut of_bf16);
        }
        // SAFETY: a device of this instance, asked for what it was found to have.
        let handle = unsafe { instance.create_device(physical, &info, None) }.map_err(failed("vkCreateDevice"))?;
        // SAFETY: the queue was asked for above.
        let queue = unsafe { handle.get_device_queue(family, 0) };
        let mut kind =
            vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE).initial_value(0);
        // SAFETY: a live device; as below.
        let timeline =
            unsafe { handle.create_semaphore(&vk::SemaphoreCreateInfo::default().push_next(&mut kind), None) };
        let timeline = timeline.map_err(failed("vkCreateSemaphore"))?;
        let info = vk::CommandPoolCreateInfo::default()
            .queue_family_index(family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: a live device.
        let pool = unsafe { handle.create_command_pool(&info, None) }.map_err(failed("vkCreateCommandPool"))?;
        let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
        // SAFETY: a live pool.
        let once = unsafe { handle.allocate_command_buffers(&info) }.map_err(failed("vkAllocateCommandBuffers"))?[0];
        // SAFETY: a device of this instance.
        let memories = unsafe { instance.get_physical_device_memory_properties(physical) };
        let local = |h: &&vk::MemoryHeap| h.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL);
        let total = memories.memory_heaps_as_slice().iter().filter(local).map(|h| h.size).max().unwrap_or(0);
        let text = |t: Result<&std::ffi::CStr, _>| {
            t.map_or_else(|_: std::ffi::FromBytesUntilNulError| String::new(), |t| t.to_string_lossy().into_owned())
        };
        let device = Device {
            loader,
            physical,
            ordinal: shown.ordinal,
            driver: format!("{} {}", text(driver.driver_name_as_c_str()), text(driver.driver_info_as_c_str())),
            version: properties.api_version,
            discrete: shown.kind == vk::PhysicalDeviceType::DISCRETE_GPU,
            limits,
            total,
            memories,
            most_bytes: maintenance.max_memory_allocation_size,
            pipelines: Pipelines::new(&properties, preserve, cache),
            clock: (clock_bits >= 36).then(|| f64::from(l.timestamp_period) * 1e-9),
            budget,
            names: loader.names.then(|| ash::ext::debug_utils::Device::new(instance, &handle)),
            family,
            queue: Mutex::new(Queue { handle: queue, pool, once, staging: None }),
            timeline,
            submitted: AtomicU64::new(0),
            current: Mutex::new((Weak::new(), 0)),
            allocated: AtomicU64::new(0),
            notes: Mutex::new(Vec::new()),
            handle,
            name,
        };
        device.name_object(device.timeline, || "timeline of submissions".into());
        device.name_object(device.handle.handle(), || device.name.clone());
        {
            let queue = device.hold();
            device.name_object(queue.handle, || "the queue".into());
            device.name_object(queue.pool, || "commands that are waited for".into());
            device.name_object(queue.once, || "what is waited for".into());
        }
        Ok(device)
    }

    /// What it is, in words.
    pub(crate) fn describe(&self) -> String {
        let gigabytes = self.total as f64 / 1e9;
        let halves = if self.limits.halves { "" } else { ", without floats of 16 bits" };
        let Limits { subgroup, shared, range, .. } = self.limits;
        let matrices = match (self.limits.matrices_bf16, self.limits.matrices_f16) {
            (true, true) => ", cooperative matrices of bf16 and f16",
            (true, false) => ", cooperative matrices of bf16",
            (false, true) => ", cooperative matrices of f16",
            (false, false) => "",
        };
        format!(
            "{}, Vulkan {}, {gigabytes:.1} GB, {}, subgroups of {subgroup}, {} KiB shared by a workgroup, buffers of at most \
             {:.1} GB{halves}{matrices}",
            self.name,
            spelled(self.version),
            self.driver.trim(),
            shared >> 10,
            range as f64 / 1e9
        )
    }

    /// Bytes that are free now, as well as the driver knows.
    pub(crate) fn free(&self) -> u64 {
        let mut budgets = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        if !self.budget {
            return self.total.saturating_sub(self.allocated.load(Ordering::Relaxed));
        }
        let mut properties = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budgets);
        // SAFETY: a device with the extension; the structures outlive the call.
        unsafe { self.loader.instance.get_physical_device_memory_properties2(self.physical, &mut properties) };
        let heaps = self.memories.memory_heaps_as_slice();
        let local = (0..heaps.len()).filter(|&i| heaps[i].flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
        local.map(|i| budgets.heap_budget[i].saturating_sub(budgets.heap_usage[i])).max().unwrap_or(0)
    }

    /// Tells people something that stopped nothing.
    pub(crate) fn note(&self, note: String) {
        let mut notes = lock(&self.notes);
        if !notes.contains(&note) {
            notes.push(note);
        }
    }

    /// What happened that did not stop anything since this was last asked.
    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.notes))
    }

    /// The error of what the validation layer objects to, if it does.
    pub(crate) fn validated(&self) -> Result<()> {
        let messages = self.loader.take_messages();
        if messages.is_empty() { Ok(()) } else { Err(VulkanError::Validation { messages }) }
    }

    /// Gives an object a name for debuggers, where the loader can.
    pub(crate) fn name_object<T: Handle>(&self, object: T, name: impl FnOnce() -> String) {
        let Some(names) = &self.names else { return };
        let Ok(name) = std::ffi::CString::new(name()) else { return };
        let info = vk::DebugUtilsObjectNameInfoEXT::default().object_handle(object).object_name(&name);
        // SAFETY: an object of this device; a name that cannot be given changes nothing.
        let _ = unsafe { names.set_debug_utils_object_name(&info) };
    }

    /// Keeps the queue for a sequence of submissions.
    pub(crate) fn hold(&self) -> MutexGuard<'_, Queue> {
        lock(&self.queue)
    }

    /// Puts commands on the queue; the number that the timeline reaches when they are done.
    pub(crate) fn submit(&self, queue: &mut Queue, commands: &[vk::CommandBuffer]) -> Result<u64> {
        let number = self.submitted.load(Ordering::Relaxed) + 1;
        let (numbers, signals) = ([number], [self.timeline]);
        let mut timeline = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&numbers);
        let info =
            vk::SubmitInfo::default().command_buffers(commands).signal_semaphores(&signals).push_next(&mut timeline);
        // SAFETY: recorded commands of this device; the queue is held.
        unsafe { self.handle.queue_submit(queue.handle, &[info], vk::Fence::null()) }
            .map_err(failed("vkQueueSubmit"))?;
        self.submitted.store(number, Ordering::Relaxed);
        Ok(number)
    }

    /// Waits until the submission of this number is done.
    pub(crate) fn wait(&self, number: u64) -> Result<()> {
        let (semaphores, numbers) = ([self.timeline], [number]);
        let info = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&numbers);
        // SAFETY: a live semaphore.
        unsafe { self.handle.wait_semaphores(&info, u64::MAX) }.map_err(failed("vkWaitSemaphores"))
    }

    /// Waits until all that was submitted is done.
    pub(crate) fn wait_all(&self) -> Result<()> {
        self.wait(self.submitted.load(Ordering::Relaxed))
    }

    /// Carries out what `record` records, behind everything submitted before, and waits for it.
    pub(crate) fn now(&self, queue: &mut Queue, record: impl FnOnce(vk::CommandBuffer)) -> Result<()> {
        let once = queue.once;
        self.record(once, vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT, record)?;
        let number = self.submit(queue, &[once])?;
        self.wait(number)
    }

    /// Records commands, anew if there were others.
    pub(crate) fn record(
        &self,
        commands: vk::CommandBuffer,
        usage: vk::CommandBufferUsageFlags,
        record: impl FnOnce(vk::CommandBuffer),
    ) -> Result<()> {
        let info = vk::CommandBufferBeginInfo::default().flags(usage);
        // SAFETY: commands of a pool that allows this, which nothing is running: callers wait before they record again.
        unsafe { self.handle.begin_command_buffer(commands, &info) }.map_err(failed("vkBeginCommandBuffer"))?;
        self.barrier(commands, Barrier::All);
        record(commands);
        // SAFETY: begun above.
        unsafe { self.handle.end_command_buffer(commands) }.map_err(failed("vkEndCommandBuffer"))
    }

    /// What it keeps apart and is before it is done and seen by what is after it.
    pub(super) fn barrier(&self, commands: vk::CommandBuffer, barrier: Barrier) {
        let (mut stages, mut reads, mut writes) =
            (vk::PipelineStageFlags::COMPUTE_SHADER, vk::AccessFlags::SHADER_READ, vk::AccessFlags::SHADER_WRITE);
        if barrier == Barrier::All {
            stages |= vk::PipelineStageFlags::TRANSFER;
            reads |= vk::AccessFlags::TRANSFER_READ;
            writes |= vk::AccessFlags::TRANSFER_WRITE;
        }
        let barrier = vk::MemoryBarrier::default().src_access_mask(writes).dst_access_mask(reads | writes);
        let none = vk::DependencyFlags::empty();
        // SAFETY: commands that are being recorded.
        unsafe { self.handle.cmd_pipeline_barrier(commands, stages, stages, none, &[barrier], &[], &[]) };
    }

    /// Records that bytes from `at` on are all set to this one: whole words, as the memory of a tensor has.
    pub(crate) fn fill(&self, commands: vk::CommandBuffer, at: Region, value: u8, bytes: usize) {
        if bytes > 0 {
            let (size, word) = (bytes.next_multiple_of(4) as u64, u32::from_le_bytes([value; 4]));
            // SAFETY: callers give ranges inside their own memory, and commands that are being recorded.
            unsafe { self.handle.cmd_fill_buffer(commands, at.buffer, at.offset, size, word) };
        }
    }

    /// Records a copy.
    pub(crate) fn copy(&self, commands: vk::CommandBuffer, from: Region, to: Region, bytes: usize) {
        if bytes > 0 && from != to {
            let copy = vk::BufferCopy { src_offset: from.offset, dst_offset: to.offset, size: bytes as u64 };
            // SAFETY: as in `fill`.
            unsafe { self.handle.cmd_copy_buffer(commands, from.buffer, to.buffer, &[copy]) };
        }
    }

    /// Runs `each` on the staging memory for one stretch of at most [`STAGING`] bytes after another.
    fn staged(
        self: &Arc<Self>,
        queue: &mut Queue,
        bytes: usize,
        mut each: impl FnMut(&mut Queue, &mut HostMemory, std::ops::Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut staging = match queue.staging.take() {
            Some(staging) => staging,
            None => HostMemory::new(self, STAGING, || "memory for copies to and from the host".into())?,
        };
        let mut done = Ok(());
        for from in (0..bytes).step_by(STAGING) {
            done = done.and_then(|()| each(queue, &mut staging, from..bytes.min(from + STAGING)));
        }
        // It holds the device, which therefore must not hold it for ever: see `release`.
        queue.staging = Some(staging);
        done
    }

    /// Copies from the host and waits for it.
    pub(crate) fn upload(self: &Arc<Self>, queue: &mut Queue, to: Region, bytes: &[u8]) -> Result<()> {
        self.staged(queue, bytes.len(), |queue, staging, part| {
            staging.bytes_mut()[..part.len()].copy_from_slice(&bytes[part.clone()]);
            let from = staging.region();
            self.now(queue, |commands| self.copy(commands, from, to.after(part.start), part.len()))
        })
    }

    /// Copies to the host, one region after another, and waits for it: once, if all of it fits the staging memory.
    pub(crate) fn download<const N: usize>(
        self: &Arc<Self>,
        queue: &mut Queue,
        mut regions: [(Region, &mut [u8]); N],
    ) -> Result<()> {
        let all: usize = regions.iter().map(|(_, bytes)| bytes.len()).sum();
        if all > STAGING {
            for (from, bytes) in regions {
                self.staged(queue, bytes.len(), |queue, staging, part| {
                    let to = staging.region();
                    self.now(queue, |commands| self.copy(commands, from.after(part.start), to, part.len()))?;
                    bytes[part.clone()].copy_from_slice(&staging.bytes()[..part.len()]);
                    Ok(())
                })?;
            }
            return Ok(());
        }
        self.staged(queue, all, |queue, staging, _| {
            let mut to = staging.region();
            self.now(queue, |commands| {
                for (from, bytes) in &regions {
                    self.copy(commands, *from, to, bytes.len());
                    to = to.after(bytes.len());
                }
            })?;
            let mut rest = staging.bytes();
            for (_, bytes) in &mut regions {
                let (mine, behind) = rest.split_at(bytes.len());
                bytes.copy_from_slice(mine);
                rest = behind;
            }
            Ok(())
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A device that was lost has nothing to wait for.
        let _ = self.wait_all();
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        queue.staging = None;
        // SAFETY: nothing runs any more, and everything else that was made on the device holds the device.
        unsafe {
            self.pipelines.destroy(&self.handle);
            self.handle.destroy_command_pool(queue.pool, None);
            self.handle.destroy_semaphore(self.timeline, None);
            self.handle.destroy_device(None);
        }
    }
}
