//! Descriptions of tensors for the tensor memory accelerator, which drivers for CUDA 12 and newer make.

use std::ffi::c_void;
use std::sync::atomic::Ordering;

use moebius_ir::DType;

use super::trampolines::{ENCODE_TENSOR, TABLE, no_device};
use crate::cuda::error::{CudaError, Result};
use crate::cuda::launch::TensorBox;

/// Bytes of a description.
const BYTES: usize = 128;

/// A description, as the driver wants it aligned.
#[repr(align(64))]
struct Description([u8; BYTES]);

/// `cuTensorMapEncodeTiled`, which `cust` does not have.
type Encode = unsafe extern "C" fn(
    map: *mut c_void,
    dtype: u32,
    rank: u32,
    address: u64,
    dims: *const u64,
    strides: *const u64,
    extent: *const u32,
    steps: *const u32,
    interleave: u32,
    swizzle: u32,
    promotion: u32,
    fill: u32,
) -> u32;

/// `CU_TENSOR_MAP_DATA_TYPE_FLOAT16` and `_BFLOAT16`.
const F16: u32 = 6;
const BF16: u32 = 9;
/// `CU_TENSOR_MAP_SWIZZLE_128B`.
const SWIZZLE_128_BYTES: u32 = 3;
/// `CU_TENSOR_MAP_L2_PROMOTION_L2_128B`: reads bring whole lines of the cache.
const PROMOTE_128_BYTES: u32 = 2;

/// Whether the loaded driver has the function.
pub(crate) fn has_tensor_boxes() -> bool {
    TABLE[ENCODE_TENSOR].load(Ordering::Acquire) != no_device as *mut ()
}

/// The description of the tensor at `address`.
///
/// # Errors
/// [`CudaError::Driver`].
pub(crate) fn describe(tensor: &TensorBox, address: u64) -> Result<Vec<u8>> {
    let dtype = match tensor.dtype {
        DType::F16 => F16,
        DType::Bf16 => BF16,
        DType::F32 | DType::I32 | DType::U32 | DType::Bool => {
            return Err(CudaError::Driver {
                call: "cuTensorMapEncodeTiled",
                code: 1,
                name: "not called".into(),
                text: format!("floats of 16 bits are described, not {}", tensor.dtype),
            });
        }
    };
    let (dims, strides) = (tensor.dims.map(|n| n as u64), tensor.strides.map(|n| n as u64));
    let (extent, steps) = (tensor.extent.map(|n| n as u32), [1u32; 3]);
    let mut description = Description([0; BYTES]);
    // SAFETY: the table's entry is the driver's function of this type, or one that takes anything and returns an error.
    let encode: Encode = unsafe { std::mem::transmute(TABLE[ENCODE_TENSOR].load(Ordering::Acquire)) };
    // SAFETY: the arrays have as many entries as the rank says, and the description its size and alignment.
    let code = unsafe {
        encode(
            description.0.as_mut_ptr().cast(),
            dtype,
            3,
            address,
            dims.as_ptr(),
            strides.as_ptr(),
            extent.as_ptr(),
            steps.as_ptr(),
            0,
            SWIZZLE_128_BYTES,
            PROMOTE_128_BYTES,
            0,
        )
    };
    if code == 0 { Ok(description.0.to_vec()) } else { Err(super::failure("cuTensorMapEncodeTiled", code)) }
}
