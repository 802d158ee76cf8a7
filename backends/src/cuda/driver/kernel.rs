//! Launches of kernels.
//!
//! From Hopper on, a kernel may be put on the GPU while the one before it on the stream still runs ("programmatic dependent
//! launch"): its first statement, `begin()` of kernels/common.cuh, waits for that one's end. What it saves is the time from one
//! kernel's end to the next one's start, in recorded plans too.

use std::ffi::c_void;
use std::sync::atomic::Ordering;

use cust::sys;

use super::check;
use super::trampolines::{LAUNCH_EX, TABLE, no_device};
use crate::cuda::error::Result;

/// `CUlaunchAttribute`, for attributes of one number.
#[repr(C)]
struct Attribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
const EARLY: u32 = 6;

/// `CUlaunchConfig`.
#[repr(C)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: sys::CUstream,
    attributes: *mut Attribute,
    count: u32,
}

/// `cuLaunchKernelEx`, which `cust` does not have.
type LaunchEx = unsafe extern "C" fn(
    config: *const Config,
    function: sys::CUfunction,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> sys::CUresult;

/// The first drivers that record such launches: of CUDA 12.3.
const RECORDS_EARLY: i32 = 12_030;

/// Whether the loaded driver, of this version, can launch a kernel while the one before still runs, and record that.
pub(crate) fn can_launch_early(version: i32) -> bool {
    version >= RECORDS_EARLY && TABLE[LAUNCH_EX].load(Ordering::Acquire) != no_device as *mut ()
}

/// Blocks, threads of a block, and bytes of shared memory that are asked for beside the kernel's own.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) grid: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared: u32,
}

/// Puts a kernel on a stream; `early` if it begins with a wait for the one before.
///
/// # Errors
/// [`crate::cuda::error::CudaError::Driver`].
///
/// # Safety
/// `function` and `stream` are live, and `arguments` point to values of the types of the kernel's parameters; the driver copies them
/// before it returns. With `early`, [`can_launch_early`] was true.
pub(crate) unsafe fn launch(
    function: sys::CUfunction,
    Shape { grid, threads, shared }: Shape,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
    early: bool,
) -> Result<()> {
    let none = std::ptr::null_mut();
    if !early {
        let [x, y, z] = grid;
        let to = arguments.as_mut_ptr();
        // SAFETY: as the caller says.
        let result = unsafe { sys::cuLaunchKernel(function, x, y, z, threads, 1, 1, shared, stream, to, none) };
        return check("cuLaunchKernel", result);
    }
    let mut attribute = Attribute { id: EARLY, padding: 0, value: [0; 16] };
    attribute.value[0] = 1;
    let config = Config { grid, block: [threads, 1, 1], shared, stream, attributes: &mut attribute, count: 1 };
    // SAFETY: the table's entry is the driver's function of this type, or one that takes anything and returns an error.
    let launch: LaunchEx = unsafe { std::mem::transmute(TABLE[LAUNCH_EX].load(Ordering::Acquire)) };
    // SAFETY: as the caller says; the configuration and its attribute live until the call returns.
    check("cuLaunchKernelEx", unsafe { launch(&config, function, arguments.as_mut_ptr(), none) })
}
