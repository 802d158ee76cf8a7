//! The storage types a CPU kernel can read and write; arithmetic is always f32.

use half::{bf16, f16};

/// A floating-point storage type. Kernels load it as f32, compute in f32 and round once on the store.
pub trait Element: bytemuck::Pod + Send + Sync + 'static {
    /// The value as f32 (exact for all three types).
    fn to_f32(self) -> f32;
    /// The value nearest to `value`, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Round to nearest even on the bits, without branches so that loops vectorise; a NaN stays a (quiet) NaN.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        let out = if value.is_nan() { quiet_nan } else { rounded };
        bf16::from_bits(out as u16)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// Runs `f` with the widest vector instructions this CPU has. Write `simd(#[inline(always)] || ..)`: the closure and
/// everything it calls must be inlined to be compiled for them, and `f` must not hand work to other threads (their closures would be compiled without).
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}
