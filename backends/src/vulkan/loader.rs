//! The Vulkan loader, found when a device is asked for, and the devices it shows.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use ash::ext::debug_utils;
use ash::vk;

use super::error::{Result, VulkanError, failed};

/// The layer that checks every call.
const VALIDATION: &CStr = c"VK_LAYER_KHRONOS_validation";

/// What it says when it has lost track of what was submitted.
const GIVEN_UP: &str = "most likely a validation bug";

/// What a validation layer said.
type Messages = Mutex<Vec<String>>;

/// An instance of Vulkan; it lives as long as the program.
pub(crate) struct Loader {
    pub(crate) instance: ash::Instance,
    /// Names objects, where the loader can and the build is for debugging.
    pub(crate) names: bool,
    /// What the validation layer said, if it is on.
    messages: Option<Box<Messages>>,
    /// The layer has lost track.
    unreliable: AtomicBool,
    pub(crate) entry: ash::Entry,
}

/// A device as the loader shows it.
pub(crate) struct Shown {
    pub(crate) physical: vk::PhysicalDevice,
    /// Its number, from 0.
    pub(crate) ordinal: usize,
    pub(crate) name: String,
    pub(crate) kind: vk::PhysicalDeviceType,
}

/// Which device is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The fastest kind there is: a card before a processor's graphics, those before a processor itself.
    Best,
    /// By its number, from 0.
    Number(usize),
    /// By a part of its name, whatever the case of the letters.
    Named(String),
}

impl Choice {
    /// What stands behind `vulkan:`, or nothing.
    pub fn parse(text: Option<&str>) -> Choice {
        match text {
            None => Choice::Best,
            Some(text) => text.parse().map_or_else(|_| Choice::Named(text.into()), Choice::Number),
        }
    }
}

/// The loader, asked for once in a program; with the validation layer or without.
pub(crate) fn load(validated: bool) -> Result<&'static Loader> {
    static LOADERS: [OnceLock<Result<Loader>>; 2] = [OnceLock::new(), OnceLock::new()];
    LOADERS[usize::from(validated)].get_or_init(|| Loader::new(validated)).as_ref().map_err(Clone::clone)
}

/// Whether the validation layer is installed.
pub(crate) fn has_validation() -> bool {
    // SAFETY: a library of the system is loaded, as with every program that uses Vulkan.
    let Ok(entry) = (unsafe { ash::Entry::load() }) else { return false };
    // SAFETY: the loader is there; nothing else is asked for.
    let layers = unsafe { entry.enumerate_instance_layer_properties() }.unwrap_or_default();
    layers.iter().any(|l| l.layer_name_as_c_str() == Ok(VALIDATION))
}

/// Keeps what a layer says.
unsafe extern "system" fn keep(
    _severity: vk::DebugUtilsMessageSeverityFlagsEXT,
    _kind: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    messages: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: the layer gives valid data, and `messages` is the box that lives as long as the loader.
    let (data, messages) = unsafe { (&*data, &*messages.cast::<Messages>()) };
    // SAFETY: the layer's text ends with a zero.
    let text = unsafe { data.message_as_c_str() }.map_or_else(String::new, |t| t.to_string_lossy().into_owned());
    messages.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    vk::FALSE
}

impl Loader {
    fn new(validated: bool) -> Result<Loader> {
        // SAFETY: a library of the system is loaded, as with every program that uses Vulkan.
        let entry = unsafe { ash::Entry::load() }.map_err(|e| VulkanError::NoLoader { why: e.to_string() })?;
        // SAFETY: the loader is there.
        let found = unsafe { entry.enumerate_instance_extension_properties(None) };
        let found = found.map_err(failed("vkEnumerateInstanceExtensionProperties"))?;
        let debug = found.iter().any(|e| e.extension_name_as_c_str() == Ok(debug_utils::NAME));
        let names = debug && (cfg!(debug_assertions) || validated);
        let extensions: Vec<_> = names.then_some(debug_utils::NAME.as_ptr()).into_iter().collect();
        let layers: Vec<_> = validated.then_some(VALIDATION.as_ptr()).into_iter().collect();
        let application = vk::ApplicationInfo::default().application_name(c"moebius").api_version(vk::API_VERSION_1_3);
        let info = vk::InstanceCreateInfo::default()
            .application_info(&application)
            .enabled_extension_names(&extensions)
            .enabled_layer_names(&layers);
        // SAFETY: the names outlive the call.
        let instance = match unsafe { entry.create_instance(&info, None) } {
            Err(vk::Result::ERROR_INCOMPATIBLE_DRIVER) => return Err(VulkanError::NoDriver),
            made => made.map_err(failed("vkCreateInstance"))?,
        };
        let mut messages = None;
        if validated && debug {
            let kept: Box<Messages> = Box::default();
            let at: *const Messages = &*kept;
            let info = vk::DebugUtilsMessengerCreateInfoEXT::default()
                .message_severity(
                    vk::DebugUtilsMessageSeverityFlagsEXT::WARNING | vk::DebugUtilsMessageSeverityFlagsEXT::ERROR,
                )
                .message_type(vk::DebugUtilsMessageTypeFlagsEXT::VALIDATION)
                .pfn_user_callback(Some(keep))
                .user_data(at.cast_mut().cast());
            // SAFETY: the instance has the extension, and the box lives as long as the loader, which is never dropped.
            let made =
                unsafe { debug_utils::Instance::new(&entry, &instance).create_debug_utils_messenger(&info, None) };
            made.map_err(failed("vkCreateDebugUtilsMessengerEXT"))?;
            messages = Some(kept);
        }
        Ok(Loader { instance, names, messages, unreliable: AtomicBool::new(false), entry })
    }

    /// Every device, in the driver's order.
    pub(crate) fn devices(&self) -> Result<Vec<Shown>> {
        // SAFETY: a live instance.
        let devices = unsafe { self.instance.enumerate_physical_devices() };
        let devices = devices.map_err(failed("vkEnumeratePhysicalDevices"))?;
        let shown = |(ordinal, physical)| {
            // SAFETY: a device of this instance.
            let properties = unsafe { self.instance.get_physical_device_properties(physical) };
            let name = properties.device_name_as_c_str().map_or_else(|_| String::new(), |n| n.to_string_lossy().into());
            Shown { physical, ordinal, name, kind: properties.device_type }
        };
        Ok(devices.into_iter().enumerate().map(shown).collect())
    }

    /// The device that is wanted.
    pub(crate) fn choose(&self, choice: &Choice) -> Result<Shown> {
        let devices = self.devices()?;
        let there = devices.iter().map(|d| format!("{}: {}", d.ordinal, d.name)).collect();
        let (wanted, found) = match choice {
            Choice::Best => {
                ("at all".into(), devices.into_iter().max_by_key(|d| (rank(d.kind), usize::MAX - d.ordinal)))
            }
            Choice::Number(n) => (format!("number {n}"), devices.into_iter().nth(*n)),
            Choice::Named(name) => {
                let lower = name.to_lowercase();
                (format!("{name:?}"), devices.into_iter().find(|d| d.name.to_lowercase().contains(&lower)))
            }
        };
        found.ok_or(VulkanError::NoDevice { wanted, there })
    }

    /// What the validation layer said since this was last asked.
    pub(crate) fn take_messages(&self) -> Vec<String> {
        let Some(messages) = &self.messages else { return Vec::new() };
        let taken = std::mem::take(&mut *messages.lock().unwrap_or_else(PoisonError::into_inner));
        // Where a program stands still for seconds, the layer gives up following its submissions, and says that this is a bug of its
        // own. What it objects to from then on means nothing.
        if taken.iter().any(|text| text.contains(GIVEN_UP)) {
            self.unreliable.store(true, Ordering::Relaxed);
        }
        if self.unreliable.load(Ordering::Relaxed) { Vec::new() } else { taken }
    }
}

/// How much a kind of device is preferred.
fn rank(kind: vk::PhysicalDeviceType) -> u32 {
    match kind {
        vk::PhysicalDeviceType::DISCRETE_GPU => 4,
        vk::PhysicalDeviceType::INTEGRATED_GPU => 3,
        vk::PhysicalDeviceType::VIRTUAL_GPU => 2,
        vk::PhysicalDeviceType::CPU => 0,
        _other => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_chosen_by_number_or_name() {
        assert_eq!(Choice::parse(None), Choice::Best);
        assert_eq!(Choice::parse(Some("1")), Choice::Number(1));
        assert_eq!(Choice::parse(Some("radeon")), Choice::Named("radeon".into()));
    }
}
