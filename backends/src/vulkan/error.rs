//! What can go wrong on a GPU with a Vulkan driver.

use ash::vk;

/// Result of a function of this backend.
pub(crate) type Result<T, E = VulkanError> = std::result::Result<T, E>;

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

fn listed(there: &[String]) -> String {
    if there.is_empty() { "no device".into() } else { there.join("; ") }
}

/// An error of the Vulkan backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VulkanError {
    /// The library that finds Vulkan drivers is not there.
    #[error("no Vulkan loader: {why} (it comes with a GPU's driver, or as libvulkan1 or vulkan-loader)")]
    NoLoader {
        /// What the system's loader of libraries said.
        why: String,
    },
    /// The loader is there and finds no driver.
    #[error(
        "no Vulkan driver: the loader found none (a GPU's driver brings one; for a processor there is mesa-vulkan-drivers)"
    )]
    NoDriver,
    /// No device of this number or name.
    #[error("no Vulkan device {wanted}: there is {}", listed(there))]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// Number and name of each that is there.
        there: Vec<String>,
    },
    /// A device without what the kernels need.
    #[error("{name} has {found}: wanted {wanted}")]
    OldDevice {
        /// What it is called.
        name: String,
        /// What is needed of it.
        wanted: String,
        /// What it has.
        found: String,
    },
    /// A shader could not be compiled: a bug of the backend.
    #[error("shader {shader} cannot be compiled:\n{log}")]
    Shader {
        /// Its file.
        shader: String,
        /// What the compiler says.
        log: String,
    },
    /// The device has too little memory.
    #[error(
        "the device has too little memory: {what} needs {}, {} of {} are free", gigabytes(*bytes), gigabytes(*free),
        gigabytes(*total)
    )]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// How much it takes.
        bytes: u64,
        /// How much is free.
        free: u64,
        /// How much the device has.
        total: u64,
    },
    /// More memory in one piece than the device gives.
    #[error("{what} needs {bytes} bytes in one piece: the device gives at most {most}")]
    TooLarge {
        /// What it was for.
        what: String,
        /// How much it takes.
        bytes: u64,
        /// How much there is in one piece.
        most: u64,
    },
    /// The device stopped working; what was on it is gone.
    #[error(
        "{call} failed: the device was lost (it was reset or removed, or a kernel ran too long); nothing on disk is affected"
    )]
    Lost {
        /// The function that told so.
        call: &'static str,
    },
    /// The driver refused a call.
    #[error("{call} failed: {name}")]
    Driver {
        /// The function.
        call: &'static str,
        /// The driver's name for the error.
        name: String,
    },
    /// The validation layer objects to what the backend does: a bug of the backend.
    #[error("the validation layer objects:\n{}", messages.join("\n"))]
    Validation {
        /// What it says.
        messages: Vec<String>,
    },
}

/// The error of a call that the driver refused.
pub(crate) fn failed(call: &'static str) -> impl FnOnce(vk::Result) -> VulkanError {
    move |result| match result {
        vk::Result::ERROR_DEVICE_LOST => VulkanError::Lost { call },
        other => VulkanError::Driver { call, name: format!("{other:?}") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_error_has_its_name_and_a_lost_device_says_so() {
        let refused = failed("vkQueueSubmit")(vk::Result::ERROR_OUT_OF_HOST_MEMORY).to_string();
        assert_eq!(refused, "vkQueueSubmit failed: ERROR_OUT_OF_HOST_MEMORY");
        assert_eq!(failed("vkQueueSubmit")(vk::Result::ERROR_DEVICE_LOST), VulkanError::Lost { call: "vkQueueSubmit" });
    }

    #[test]
    fn a_device_that_is_not_there_is_told_with_those_that_are() {
        let there = vec!["0: Some GPU".to_owned()];
        let text = VulkanError::NoDevice { wanted: "\"radeon\"".into(), there }.to_string();
        assert!(text.contains("radeon") && text.contains("0: Some GPU"), "{text}");
    }
}
