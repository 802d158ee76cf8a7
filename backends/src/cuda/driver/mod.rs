//! The NVIDIA driver, loaded when it is first needed.
//!
//! `cust` calls the driver's functions as if they were linked. [`trampolines`] defines them: each jumps through a table whose
//! entries return "no device" until [`load`] has found `libcuda.so.1` and filled it. So the program has no libcuda among
//! its needs and starts on any machine.

mod calls;
mod kernel;
mod tensor_box;
mod trampolines;

use std::ffi::CStr;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use cust::sys;

use super::error::{CudaError, Result};

pub(crate) use calls::Counter;
pub use calls::DriverCalls;
pub(crate) use kernel::{Shape, can_launch_early, launch};
pub(crate) use tensor_box::{describe, has_tensor_boxes};

/// Where the driver is looked for: the loader's path, where every installation of it puts itself.
const LIBRARY: &str = "libcuda.so.1";

/// The oldest driver this backend runs on, as the driver counts: 1000 major + 10 minor of its CUDA version.
const OLDEST: i32 = 12_000;

/// Loads the driver once; later calls give the first result.
///
/// # Errors
/// [`CudaError::NoDriver`] if there is none, [`CudaError::OldDriver`] if it lacks something.
pub(crate) fn load() -> Result<()> {
    static LOADED: OnceLock<Result<()>> = OnceLock::new();
    LOADED.get_or_init(|| fill(Path::new(LIBRARY))).clone()
}

/// Fills the table with the functions of the library at `path`.
fn fill(path: &Path) -> Result<()> {
    let none = |why: String| CudaError::NoDriver { looked_for: path.display().to_string(), why };
    // SAFETY: the driver's initialisers have no conditions.
    let library = unsafe { libloading::Library::new(path) }.map_err(|e| none(why(&e)))?;
    let mut found = Vec::with_capacity(trampolines::NAMES.len());
    let mut missing = Vec::new();
    for name in trampolines::NAMES {
        // SAFETY: the symbol is only taken as an address here; the trampoline of the same name has its type.
        match unsafe { library.get::<*mut ()>(name.as_bytes()) } {
            Ok(symbol) => found.push(Some(*symbol)),
            Err(_) => {
                found.push(None);
                missing.push((*name).to_owned());
            }
        }
    }
    let wanted = |name: &&String| trampolines::NEEDED.contains(&name.as_str());
    let needed: Vec<String> = missing.iter().filter(wanted).cloned().collect();
    if !needed.is_empty() {
        return Err(CudaError::OldDriver {
            wanted: format!("the functions {}", needed.join(", ")),
            found: format!("a {} without them", path.display()),
        });
    }
    for (slot, symbol) in trampolines::TABLE.iter().zip(found) {
        if let Some(symbol) = symbol {
            slot.store(symbol, Ordering::Release);
        }
    }
    // The table points into it for as long as the program runs.
    std::mem::forget(library);
    let mut version = 0;
    // SAFETY: the table was filled above, and the pointer is valid.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < OLDEST {
        return Err(CudaError::OldDriver {
            wanted: format!("one for CUDA {} or newer", spelled(OLDEST)),
            found: format!("one for CUDA {}", spelled(version)),
        });
    }
    Ok(())
}

/// What the loader says.
fn why(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The CUDA version that the loaded driver supports, as the driver counts.
///
/// # Errors
/// [`CudaError::Driver`].
pub(crate) fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the pointer is valid.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok(version)
}

/// A CUDA version as people write it: 12040 is 12.4.
pub(crate) fn spelled(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The result of a call of the driver, with the driver's name and text for a failure.
pub(crate) fn check(call: &'static str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failure(call, result as u32)) }
}

/// The failure of a call of `cust`.
pub(crate) fn failed(call: &'static str) -> impl Fn(cust::error::CudaError) -> CudaError {
    move |e| failure(call, e as u32)
}

fn failure(call: &'static str, code: u32) -> CudaError {
    type Words = unsafe extern "C" fn(u32, *mut *const std::ffi::c_char) -> u32;
    let words = |entry: usize| {
        let mut text: *const std::ffi::c_char = std::ptr::null();
        // SAFETY: the two functions that are asked for take any number as a code and give a static text or an error.
        let function: Words = unsafe { std::mem::transmute(trampolines::TABLE[entry].load(Ordering::Acquire)) };
        // SAFETY: as above; without a driver the entry returns an error and leaves the text alone.
        let known = unsafe { function(code, &mut text) } == 0 && !text.is_null();
        // SAFETY: a static text that ends in a zero byte.
        known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    let name = words(trampolines::GET_ERROR_NAME).unwrap_or_else(|| "an error".into());
    let text = words(trampolines::GET_ERROR_STRING).unwrap_or_else(|| "the driver has no text for it".into());
    CudaError::Driver { call, code, name, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_not_there_is_named() {
        let error = fill(Path::new("/nowhere/libcuda.so.1")).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, CudaError::NoDriver { .. }) && text.contains("/nowhere/libcuda.so.1"), "{text}");
    }

    #[test]
    fn a_library_without_the_functions_is_an_old_driver() {
        // Any library will do; the C library is always there.
        let error = fill(Path::new("libc.so.6")).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, CudaError::OldDriver { .. }) && text.contains("cuGraphLaunch"), "{text}");
    }

    #[test]
    fn versions_are_spelled_as_people_write_them() {
        assert_eq!((spelled(12_040), spelled(13_000)), ("12.4".into(), "13.0".into()));
    }

    #[test]
    fn without_a_driver_every_function_says_so() {
        if load().is_err() {
            let mut count = 0;
            // SAFETY: the pointer is valid.
            let result = unsafe { sys::cuDeviceGetCount(&mut count) };
            assert_eq!(result, sys::CUresult::CUDA_ERROR_NO_DEVICE);
            let error = check("cuDeviceGetCount", result).unwrap_err().to_string();
            assert!(error.contains("cuDeviceGetCount") && error.contains("100"), "{error}");
        }
    }
}
