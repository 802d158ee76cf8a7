//! Kernels ready to be launched, made of their texts at first use; what a driver makes of them is kept on disk.

use std::collections::HashMap;
use std::sync::Mutex;

use ash::vk;

use super::device::{Device, NUMBER_BYTES, lock};
use super::error::{Result, VulkanError, failed};
use super::shader::Source;
use super::spirv;
use crate::cache::{Cache, Found};

/// A kernel on the device.
#[derive(Clone, Copy)]
pub(crate) struct Pipeline {
    pub(crate) handle: vk::Pipeline,
    pub(crate) layout: vk::PipelineLayout,
    /// The layout of its buffers.
    pub(crate) buffers: vk::DescriptorSetLayout,
}

/// The kernels made so far, and those on disk.
pub(crate) struct Pipelines {
    made: Mutex<HashMap<u128, Pipeline>>,
    /// Those that were made twice.
    spare: Mutex<Vec<Pipeline>>,
    preserve: bool,
    cache: Cache,
    /// The device and its driver, to the letter.
    identity: String,
}

impl Pipelines {
    /// `preserve`: the device can promise to keep infinities and NaN.
    pub(crate) fn new(properties: &vk::PhysicalDeviceProperties, preserve: bool, cache: Cache) -> Pipelines {
        let p = properties;
        let uuid: String = p.pipeline_cache_uuid.iter().map(|b| format!("{b:02x}")).collect();
        let identity = format!("vulkan {:x} {:x} {:x} {uuid}", p.vendor_id, p.device_id, p.driver_version);
        Pipelines { made: Mutex::new(HashMap::new()), spare: Mutex::new(Vec::new()), preserve, cache, identity }
    }

    /// Nothing may use them any more.
    pub(crate) unsafe fn destroy(&mut self, device: &ash::Device) {
        for p in lock(&self.made).drain().map(|(_, p)| p).chain(lock(&self.spare).drain(..)) {
            // SAFETY: as the caller says.
            unsafe {
                device.destroy_pipeline(p.handle, None);
                device.destroy_pipeline_layout(p.layout, None);
                device.destroy_descriptor_set_layout(p.buffers, None);
            }
        }
    }
}

impl Device {
    /// The kernels of all these sources, in their order. Those not made yet are made side by side.
    pub(crate) fn pipelines(&self, sources: &[&Source]) -> Result<Vec<Pipeline>> {
        use rayon::prelude::*;
        let key = |s: &&Source| {
            let dtype = s.cooperative.map_or("", |dtype| dtype.name());
            Cache::key(&[&s.text, &s.buffers.to_string(), dtype, &self.pipelines.identity])
        };
        let keys: Vec<u128> = sources.iter().map(key).collect();
        let mut missing: Vec<usize> = {
            let made = lock(&self.pipelines.made);
            (0..keys.len()).filter(|&i| !made.contains_key(&keys[i])).collect()
        };
        missing.sort_by_key(|&i| keys[i]);
        missing.dedup_by_key(|&mut i| keys[i]);
        missing.par_iter().try_for_each(|&i| {
            let pipeline = self.pipeline(sources[i], keys[i])?;
            // Another thread may have made it meanwhile, and handed it out.
            if let Some(spare) = lock(&self.pipelines.made).insert(keys[i], pipeline) {
                lock(&self.pipelines.spare).push(spare);
            }
            Ok(())
        })?;
        let made = lock(&self.pipelines.made);
        Ok(keys.iter().map(|k| made[k]).collect())
    }

    /// Makes a kernel, with what is on disk of it if that is there.
    fn pipeline(&self, source: &Source, key: u128) -> Result<Pipeline> {
        let words = spirv::compile(&source.text, source.cooperative, self.pipelines.preserve)
            .map_err(|log| VulkanError::Shader { shader: source.title.clone(), log })?;
        let kept = match self.pipelines.cache.get(key) {
            Found::Code(data) => data,
            Found::Nothing => Vec::new(),
            Found::Damaged(why) => {
                self.note(format!("a compiled kernel is damaged and made anew: {why}"));
                Vec::new()
            }
        };
        let info = vk::PipelineCacheCreateInfo::default().initial_data(&kept);
        // SAFETY: a live device, here and below; what a driver kept is checked by a sum of ours, and by the driver against itself.
        let cache = unsafe { self.handle.create_pipeline_cache(&info, None) };
        let cache = cache.map_err(failed("vkCreatePipelineCache"))?;
        let name = || source.title.clone();
        self.name_object(cache, name);
        let made = self.layouts(source.buffers).and_then(|(buffers, layout)| {
            let handle = self.compute_pipeline(&words, layout, cache, &name);
            if handle.is_err() {
                // SAFETY: made above and used by nothing.
                unsafe {
                    self.handle.destroy_pipeline_layout(layout, None);
                    self.handle.destroy_descriptor_set_layout(buffers, None);
                }
            }
            Ok(Pipeline { handle: handle?, layout, buffers })
        });
        if let Ok(pipeline) = &made {
            self.name_object(pipeline.handle, name);
            self.name_object(pipeline.layout, name);
            self.name_object(pipeline.buffers, name);
            if kept.is_empty() {
                self.keep(cache, key);
            }
        }
        // SAFETY: made above; a pipeline does not need it any more.
        unsafe { self.handle.destroy_pipeline_cache(cache, None) };
        made
    }

    /// Writes what the driver made to disk. Where that does not work, it costs time later, and is no error.
    fn keep(&self, cache: vk::PipelineCache, key: u128) {
        // SAFETY: a live cache of this device.
        let Ok(data) = (unsafe { self.handle.get_pipeline_cache_data(cache) }) else { return };
        if let Err(e) = self.pipelines.cache.put(key, &data) {
            self.note(format!("compiled kernels cannot be kept for the next time: {e}"));
        }
    }

    /// The layout of so many buffers and of a kernel's other values.
    fn layouts(&self, buffers: usize) -> Result<(vk::DescriptorSetLayout, vk::PipelineLayout)> {
        let binding = |i| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(i as u32)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let bindings: Vec<_> = (0..buffers).map(binding).collect();
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: a live device, here and below.
        let sets = unsafe { self.handle.create_descriptor_set_layout(&info, None) };
        let sets = [sets.map_err(failed("vkCreateDescriptorSetLayout"))?];
        let numbers = vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(NUMBER_BYTES);
        let numbers = [numbers];
        let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets).push_constant_ranges(&numbers);
        // SAFETY: as above.
        match unsafe { self.handle.create_pipeline_layout(&info, None) } {
            Ok(layout) => Ok((sets[0], layout)),
            Err(e) => {
                // SAFETY: made above and used by nothing.
                unsafe { self.handle.destroy_descriptor_set_layout(sets[0], None) };
                Err(failed("vkCreatePipelineLayout")(e))
            }
        }
    }

    fn compute_pipeline(
        &self,
        words: &[u32],
        layout: vk::PipelineLayout,
        cache: vk::PipelineCache,
        name: &dyn Fn() -> String,
    ) -> Result<vk::Pipeline> {
        let info = vk::ShaderModuleCreateInfo::default().code(words);
        // SAFETY: a live device, here and below; the words are a valid module, as naga writes them.
        let module =
            unsafe { self.handle.create_shader_module(&info, None) }.map_err(failed("vkCreateShaderModule"))?;
        self.name_object(module, name);
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        let info = vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout);
        // SAFETY: as above.
        let made = unsafe { self.handle.create_compute_pipelines(cache, &[info], None) };
        // SAFETY: a pipeline does not need its module any more.
        unsafe { self.handle.destroy_shader_module(module, None) };
        made.map(|p| p[0]).map_err(|(_, e)| failed("vkCreateComputePipelines")(e))
    }
}
