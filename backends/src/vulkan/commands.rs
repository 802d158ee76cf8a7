//! What an instance has recorded: the buffers of all its kernels, and its whole plan as one sequence of commands.

use std::sync::Arc;

use ash::vk;

use super::device::Device;
use super::error::{Result, failed};
use super::executable::{Addresses, Bound, Program};

/// Command buffers of one owner.
pub(super) struct Commands {
    device: Arc<Device>,
    pool: vk::CommandPool,
}

impl Commands {
    pub(super) fn new(device: &Arc<Device>) -> Result<Commands> {
        let info = vk::CommandPoolCreateInfo::default()
            .queue_family_index(device.family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: a live device.
        let pool = unsafe { device.handle.create_command_pool(&info, None) }.map_err(failed("vkCreateCommandPool"))?;
        device.name_object(pool, || "commands of an instance".into());
        Ok(Commands { device: Arc::clone(device), pool })
    }

    /// One more, which lives as long as this, for what the name says.
    pub(super) fn take(&self, name: impl FnOnce() -> String) -> Result<vk::CommandBuffer> {
        let info = vk::CommandBufferAllocateInfo::default().command_pool(self.pool).command_buffer_count(1);
        // SAFETY: a live pool, which only its owner uses.
        let taken = unsafe { self.device.handle.allocate_command_buffers(&info) };
        let taken = taken.map_err(failed("vkAllocateCommandBuffers"))?[0];
        self.device.name_object(taken, name);
        Ok(taken)
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        // A device that was lost runs nothing.
        let _ = self.device.wait_all();
        // SAFETY: nothing of it runs any more.
        unsafe { self.device.handle.destroy_command_pool(self.pool, None) };
    }
}

/// A set of buffers for each kernel of a program, in its order.
pub(super) struct Sets {
    device: Arc<Device>,
    pool: vk::DescriptorPool,
    pub(super) sets: Vec<vk::DescriptorSet>,
}

impl Sets {
    pub(super) fn new(program: &Program, addresses: Addresses<'_>) -> Result<Sets> {
        let (device, (kernels, buffers)) = (&program.device, program.kernels());
        let sizes = [vk::DescriptorPoolSize {
            ty: vk::DescriptorType::STORAGE_BUFFER,
            descriptor_count: buffers.max(1) as u32,
        }];
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(kernels.max(1) as u32).pool_sizes(&sizes);
        // SAFETY: a live device, here and below.
        let pool = unsafe { device.handle.create_descriptor_pool(&info, None) };
        let pool = pool.map_err(failed("vkCreateDescriptorPool"))?;
        device.name_object(pool, || "buffers of the kernels of an instance".into());
        let mut sets = Sets { device: Arc::clone(device), pool, sets: Vec::with_capacity(kernels) };
        for step in program.launches() {
            for bound in &step.actions {
                let Bound::Kernel { pipeline, buffers, .. } = bound else { continue };
                let layouts = [pipeline.buffers];
                let info = vk::DescriptorSetAllocateInfo::default().descriptor_pool(pool).set_layouts(&layouts);
                // SAFETY: as above.
                let set = unsafe { device.handle.allocate_descriptor_sets(&info) };
                let set = set.map_err(failed("vkAllocateDescriptorSets"))?[0];
                device.name_object(set, || {
                    let op = program.plan.graph().node(step.node).op.name();
                    format!("buffers of step {}, {op}", step.number)
                });
                let places: Vec<_> = buffers
                    .iter()
                    .map(|&at| {
                        let (region, bytes) = addresses.buffer(step, at);
                        let info = vk::DescriptorBufferInfo::default().buffer(region.buffer);
                        [info.offset(region.offset).range(bytes as u64)]
                    })
                    .collect();
                let mut writes = Vec::with_capacity(places.len());
                for (i, place) in places.iter().enumerate() {
                    let write = vk::WriteDescriptorSet::default().dst_set(set).dst_binding(i as u32);
                    writes.push(write.descriptor_type(vk::DescriptorType::STORAGE_BUFFER).buffer_info(place));
                }
                // SAFETY: a set that nothing uses yet; the buffers are those of the instance and of the store.
                unsafe { device.handle.update_descriptor_sets(&writes, &[]) };
                sets.sets.push(set);
            }
        }
        Ok(sets)
    }
}

impl Drop for Sets {
    fn drop(&mut self) {
        // As above.
        let _ = self.device.wait_all();
        // SAFETY: nothing uses the sets any more.
        unsafe { self.device.handle.destroy_descriptor_pool(self.pool, None) };
    }
}
