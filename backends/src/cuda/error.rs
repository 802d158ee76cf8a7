//! What can go wrong on an NVIDIA GPU.

use crate::error::memory;

/// Result of a function of this backend.
pub(crate) type Result<T, E = CudaError> = std::result::Result<T, E>;

/// An error of the CUDA backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// There is no NVIDIA driver.
    #[error("no NVIDIA driver: looked for {looked_for} ({why})")]
    NoDriver {
        /// The library.
        looked_for: String,
        /// What the loader said.
        why: String,
    },
    /// The driver cannot do what is needed.
    #[error(
        "the NVIDIA driver is too old: wanted {wanted}, found {found}; a newer driver helps, and the device `cpu` needs none"
    )]
    OldDriver {
        /// What is needed of it.
        wanted: String,
        /// What it is.
        found: String,
    },
    /// There is a driver, but no GPU of this number.
    #[error("no GPU number {wanted}: the driver shows {there}")]
    NoDevice {
        /// The number asked for, from 0.
        wanted: usize,
        /// How many there are.
        there: usize,
    },
    /// A GPU without what the kernels need.
    #[error("{name} has compute capability {}.{}: wanted 8.0 or newer", found.0, found.1)]
    OldDevice {
        /// What it is called.
        name: String,
        /// Its compute capability.
        found: (i32, i32),
    },
    /// NVRTC, which compiles the kernels, is not there.
    #[error(
        "no NVRTC, which compiles the kernels: looked for {} (it comes with the CUDA toolkit, or with `pip install \
         nvidia-cuda-nvrtc`; CUDA_PATH names a toolkit)",
        looked_for.join(", ")
    )]
    NoCompiler {
        /// Every file it was looked for in.
        looked_for: Vec<String>,
    },
    /// NVRTC failed otherwise than by an error in a kernel.
    #[error("NVRTC: {call} failed: {text}")]
    Compiler {
        /// The function.
        call: &'static str,
        /// What it says.
        text: String,
    },
    /// A kernel could not be compiled.
    #[error("kernel {kernel} cannot be compiled for {arch}:\n{log}")]
    Kernel {
        /// Its file, and what was defined.
        kernel: String,
        /// The architecture.
        arch: String,
        /// What the compiler says.
        log: String,
    },
    /// The GPU has too little memory.
    #[error(
        "the GPU has too little memory: {what} needs {}, {} of {} are free",
        memory(*bytes), memory(*free), memory(*total)
    )]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// How much it takes.
        bytes: u64,
        /// How much is free.
        free: u64,
        /// How much the GPU has.
        total: u64,
    },
    /// The driver refused a call.
    #[error("{call} failed: {name} ({code}): {text}")]
    Driver {
        /// The function.
        call: &'static str,
        /// The driver's number for the error.
        code: u32,
        /// The driver's name for it.
        name: String,
        /// The driver's text for it.
        text: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_in_numbers() {
        let error = CudaError::OutOfMemory {
            what: "the arena of a plan".into(),
            bytes: 90_000_000_000,
            free: 70_000_000_000,
            total: 80_000_000_000,
        };
        let text = error.to_string();
        assert!(text.contains("90.00 GB") && text.contains("70.00 GB of 80.00 GB"), "{text}");
        assert_eq!(
            [4_500_000_000, 450_000_000, 1_250_000, 7].map(memory),
            ["4.50 GB", "0.45 GB", "1.25 MB", "0.01 kB"]
        );
    }
}
