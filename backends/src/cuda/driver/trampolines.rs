//! The driver's functions, each a jump through [`TABLE`].
//!
//! The list holds every function that `cust` refers to, used or not, and those that this backend calls by itself.

use std::arch::naked_asm;
use std::sync::atomic::AtomicPtr;

/// `CUDA_ERROR_NO_DEVICE`: what every function returns until the driver is loaded.
pub(super) extern "C" fn no_device() -> i32 {
    100
}

/// The functions without which the backend cannot run. Others are in the list because `cust` refers to them somewhere.
pub(super) const NEEDED: &[&str] = &[
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventElapsedTime",
    "cuEventQuery",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemGetInfo_v2",
    "cuModuleLoadDataEx",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
];

macro_rules! trampolines {
    ($($name:ident),* $(,)?) => {
        /// The place of each function in the table.
        #[allow(non_camel_case_types, clippy::enum_variant_names)]
        #[derive(Clone, Copy)]
        enum Entry { $($name),* }

        /// The names of the functions, in the order of the table.
        pub(super) const NAMES: &[&str] = &[$(stringify!($name)),*];

        /// Where each function is.
        pub(super) static TABLE: [AtomicPtr<()>; NAMES.len()] =
            [const { AtomicPtr::new(no_device as *mut ()) }; NAMES.len()];

        $(
            // SAFETY: all arguments stay where they are; the function that is jumped to has this one's type.
            #[unsafe(naked)]
            // SAFETY: the driver's name, which nothing else defines: the program is linked with an empty libcuda.
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name() {
                #[cfg(target_arch = "x86_64")]
                naked_asm!(
                    "jmp qword ptr [rip + {table} + {offset}]",
                    table = sym TABLE,
                    offset = const 8 * Entry::$name as usize,
                );
                #[cfg(target_arch = "aarch64")]
                naked_asm!(
                    "adrp x16, {table}",
                    "add x16, x16, :lo12:{table}",
                    "ldr x16, [x16, #{offset}]",
                    "br x16",
                    table = sym TABLE,
                    offset = const 8 * Entry::$name as usize,
                );
            }
        )*
    };
}

trampolines! {
    cuArray3DCreate_v2, cuArray3DGetDescriptor_v2, cuArrayDestroy, cuCtxCreate_v2, cuCtxDestroy_v2,
    cuCtxGetApiVersion, cuCtxGetCacheConfig, cuCtxGetCurrent, cuCtxGetDevice, cuCtxGetFlags, cuCtxGetLimit,
    cuCtxGetSharedMemConfig, cuCtxGetStreamPriorityRange, cuCtxPopCurrent_v2, cuCtxPushCurrent_v2,
    cuCtxSetCacheConfig, cuCtxSetCurrent, cuCtxSetLimit, cuCtxSetSharedMemConfig, cuCtxSynchronize,
    cuDestroyExternalMemory, cuDeviceGet, cuDeviceGetAttribute, cuDeviceGetCount, cuDeviceGetName,
    cuDevicePrimaryCtxRelease_v2, cuDevicePrimaryCtxReset_v2, cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxSetFlags_v2,
    cuDeviceTotalMem_v2, cuDriverGetVersion, cuEventCreate, cuEventDestroy_v2, cuEventElapsedTime, cuEventQuery,
    cuEventRecord, cuEventSynchronize, cuExternalMemoryGetMappedBuffer, cuFuncGetAttribute, cuFuncSetAttribute,
    cuFuncSetCacheConfig,
    cuFuncSetSharedMemConfig, cuGetErrorName, cuGetErrorString, cuGraphAddKernelNode, cuGraphCreate,
    cuGraphDebugDotPrint, cuGraphDestroy, cuGraphExecDestroy, cuGraphGetEdges, cuGraphGetNodes,
    cuGraphInstantiateWithFlags, cuGraphKernelNodeGetParams, cuGraphLaunch, cuGraphNodeGetType,
    cuImportExternalMemory, cuInit, cuLaunchHostFunc, cuLaunchKernel, cuLinkAddData_v2, cuLinkComplete,
    cuLinkCreate_v2, cuLinkDestroy, cuMemAdvise, cuMemAllocAsync, cuMemAllocHost_v2, cuMemAllocManaged, cuMemAlloc_v2,
    cuMemFreeAsync, cuMemFreeHost, cuMemFree_v2, cuMemGetInfo_v2, cuMemPrefetchAsync, cuMemcpy2D_v2, cuMemcpyAtoH_v2,
    cuMemcpyDtoDAsync_v2, cuMemcpyDtoD_v2, cuMemcpyDtoHAsync_v2, cuMemcpyDtoH_v2, cuMemcpyHtoA_v2,
    cuMemcpyHtoDAsync_v2, cuMemcpyHtoD_v2, cuMemsetD16Async, cuMemsetD16_v2, cuMemsetD32Async, cuMemsetD32_v2,
    cuMemsetD8Async, cuMemsetD8_v2, cuModuleGetFunction, cuModuleGetGlobal_v2, cuModuleLoad, cuModuleLoadData,
    cuModuleLoadDataEx, cuModuleUnload, cuOccupancyAvailableDynamicSMemPerBlock,
    cuOccupancyMaxActiveBlocksPerMultiprocessor, cuOccupancyMaxPotentialBlockSize, cuStreamBeginCapture_v2,
    cuStreamCreateWithPriority, cuStreamDestroy_v2, cuStreamEndCapture, cuStreamGetFlags, cuStreamGetPriority,
    cuStreamSynchronize, cuStreamWaitEvent, cuSurfObjectCreate, cuSurfObjectDestroy, cuSurfObjectGetResourceDesc,
    cuTexObjectCreate, cuTexObjectDestroy, cuTexObjectGetResourceDesc, cuTexObjectGetResourceViewDesc,
    cuLaunchKernelEx, cuTensorMapEncodeTiled,
}

/// Place of the function that gives an error's name.
pub(super) const GET_ERROR_NAME: usize = Entry::cuGetErrorName as usize;
/// Place of the function that launches a kernel with attributes.
pub(super) const LAUNCH_EX: usize = Entry::cuLaunchKernelEx as usize;
/// Place of the function that describes a tensor to the tensor memory accelerator.
pub(super) const ENCODE_TENSOR: usize = Entry::cuTensorMapEncodeTiled as usize;
/// Place of the function that gives an error's text.
pub(super) const GET_ERROR_STRING: usize = Entry::cuGetErrorString as usize;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the feature `cuda` needs x86-64 or aarch64");
