//! Kernels without intrinsics: arrays the compiler turns into whatever vectors the target has.

use half::{bf16, f16};

use super::kernel::{Simd, Source, isa};
use crate::cpu::element::Element;

/// Four floats: one vector of SSE or NEON.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// Fused where that is one instruction; the C library's exact `fma` would be a hundred times slower.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    const COL: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: the caller's pointer has 4 elements; pairs of bf16 are read through it too, so it may lie at any 2 bytes.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        // SAFETY: as above.
        unsafe { p.cast::<[f32; 4]>().write(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| mul_add(a[i], b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> [f32; 4] {
        // SAFETY: the caller's pointer has 4 elements.
        unsafe { p.cast::<[bf16; 4]>().read() }.map(Element::to_f32)
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut bf16, v: [f32; 4]) {
        // SAFETY: as above.
        unsafe { p.cast::<[bf16; 4]>().write(v.map(Element::from_f32)) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> [f32; 4] {
        // SAFETY: as above.
        unsafe { p.cast::<[f16; 4]>().read() }.map(Element::to_f32)
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut f16, v: [f32; 4]) {
        // SAFETY: as above.
        unsafe { p.cast::<[f16; 4]>().write(v.map(Element::from_f32)) }
    }
    #[inline(always)]
    unsafe fn copy_few<T: Source>(src: *const T, n: usize, dst: *mut f32) {
        for i in 0..n {
            // SAFETY: the caller's contract.
            unsafe { *dst.add(i) = (*src.add(i)).to_f32() };
        }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [[f32; 4]; 16]) {
        for i in 0..4 {
            for j in 0..i {
                (rows[i][j], rows[j][i]) = (rows[j][i], rows[i][j]);
            }
        }
    }
    #[inline(always)]
    unsafe fn split_bf16(v: [f32; 4]) -> ([f32; 4], [f32; 4]) {
        (v.map(|x| f32::from_bits(x.to_bits() << 16)), v.map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)))
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_l2(_: *const u8) {}
}

isa!("portable", Portable, [1 x 8, 2 x 4, 3 x 4, 4 x 2, 5 x 2, 6 x 2]);
