//! Whether a device has the cooperative matrices that the kernels use, and how they are turned on.

use std::ffi::{CStr, c_void};

use ash::khr::cooperative_matrix;
use ash::vk;

use super::loader::Loader;

/// Lanes of a subgroup of the kernels, and the side of their matrices.
const LANES: u32 = 32;
const SIDE: u32 = 16;
/// VK_KHR_shader_bfloat16, which is younger than `ash`: its name, the type of its features, the type of bf16.
const BF16: &CStr = c"VK_KHR_shader_bfloat16";
const BF16_FEATURES: vk::StructureType = vk::StructureType::from_raw(1_000_141_000);
const BF16_COMPONENT: vk::ComponentTypeKHR = vk::ComponentTypeKHR::from_raw(1_000_141_000);

/// VkPhysicalDeviceShaderBfloat16FeaturesKHR.
#[repr(C)]
pub(super) struct Bf16Features {
    ty: vk::StructureType,
    next: *mut c_void,
    /// Kernels may load, store and convert bf16.
    element: vk::Bool32,
    dot_product: vk::Bool32,
    /// Cooperative matrices may have it.
    matrix: vk::Bool32,
}

impl Bf16Features {
    pub(super) fn new(on: bool) -> Bf16Features {
        let on = vk::Bool32::from(on);
        Bf16Features { ty: BF16_FEATURES, next: std::ptr::null_mut(), element: on, dot_product: vk::FALSE, matrix: on }
    }
}

// SAFETY: laid out as the specification of the extension says, with its type.
unsafe impl vk::ExtendsPhysicalDeviceFeatures2 for Bf16Features {}
// SAFETY: as above.
unsafe impl vk::ExtendsDeviceCreateInfo for Bf16Features {}
// SAFETY: as above.
unsafe impl vk::TaggedStructure for Bf16Features {
    const STRUCTURE_TYPE: vk::StructureType = BF16_FEATURES;
}

/// Which factors a device multiplies; sums are f32.
#[derive(Clone, Copy, Default)]
pub(super) struct Matrices {
    pub(super) bf16: bool,
    pub(super) f16: bool,
}

impl Matrices {
    /// Those of a device of Vulkan 1.3 at least with subgroups of `subgroup` lanes.
    pub(super) fn of(
        loader: &Loader,
        physical: vk::PhysicalDevice,
        subgroup: u32,
        has: impl Fn(&CStr) -> bool,
    ) -> Matrices {
        if subgroup != LANES || !has(cooperative_matrix::NAME) {
            return Matrices::default();
        }
        let mut bf16 = Bf16Features::new(false);
        let mut sizes = vk::PhysicalDeviceSubgroupSizeControlProperties::default();
        let mut features = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default();
        let mut v12 = vk::PhysicalDeviceVulkan12Features::default();
        let mut all = vk::PhysicalDeviceFeatures2::default().push_next(&mut features).push_next(&mut v12);
        if has(BF16) {
            all = all.push_next(&mut bf16);
        }
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut sizes);
        // SAFETY: a device of this instance; the structures outlive the calls.
        unsafe {
            loader.instance.get_physical_device_features2(physical, &mut all);
            loader.instance.get_physical_device_properties2(physical, &mut properties);
        }
        let same = sizes.min_subgroup_size == LANES && sizes.max_subgroup_size == LANES;
        let on = |flag| flag == vk::TRUE;
        let ordered = on(v12.vulkan_memory_model) && on(v12.vulkan_memory_model_device_scope);
        if !(same && ordered && on(features.cooperative_matrix)) {
            return Matrices::default();
        }
        // A loader older than the extension may not pass its function on.
        let name = c"vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR".as_ptr();
        // SAFETY: a live instance, and a name that ends with a zero.
        if unsafe { loader.entry.get_instance_proc_addr(loader.instance.handle(), name) }.is_none() {
            return Matrices::default();
        }
        let extension = cooperative_matrix::Instance::new(&loader.entry, &loader.instance);
        // SAFETY: a device of this instance with the extension.
        let kinds =
            unsafe { extension.get_physical_device_cooperative_matrix_properties(physical) }.unwrap_or_default();
        let multiplies = |factor| {
            kinds.iter().any(|k| {
                (k.m_size, k.n_size, k.k_size) == (SIDE, SIDE, SIDE)
                    && (k.a_type, k.b_type) == (factor, factor)
                    && [k.c_type, k.result_type] == [vk::ComponentTypeKHR::FLOAT32; 2]
                    && k.scope == vk::ScopeKHR::SUBGROUP
            })
        };
        Matrices {
            bf16: on(bf16.element) && on(bf16.matrix) && multiplies(BF16_COMPONENT),
            f16: on(v12.shader_float16) && multiplies(vk::ComponentTypeKHR::FLOAT16),
        }
    }

    /// Whether there are any.
    pub(super) fn any(self) -> bool {
        self.bf16 || self.f16
    }

    /// The extensions to turn on.
    pub(super) fn extensions(self) -> impl Iterator<Item = &'static CStr> {
        let matrices = self.any().then_some(cooperative_matrix::NAME);
        matrices.into_iter().chain(self.bf16.then_some(BF16))
    }
}
