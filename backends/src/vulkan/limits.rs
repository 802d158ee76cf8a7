//! What the lowering asks of a device.

/// A kind of device, as far as kernels and their choice depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Floats of 16 bits can be read and written.
    pub halves: bool,
    /// The most workgroups along an axis.
    pub groups: usize,
    /// Bytes of memory that a workgroup shares.
    pub shared: usize,
    /// The most buffers of a kernel.
    pub buffers: usize,
    /// The most bytes of a buffer as a kernel sees it.
    pub range: usize,
    /// It is a processor, whose compiler takes long for what is unrolled.
    pub processor: bool,
    /// The most threads of a workgroup.
    pub threads: usize,
    /// Lanes that run in step.
    pub subgroup: usize,
    /// Every 32 neighbouring threads are a subgroup, whose lanes exchange values.
    pub shuffles: bool,
    /// Subgroups of 32 lanes multiply matrices of bf16, 16 x 16, with sums in f32.
    pub matrices_bf16: bool,
    /// The same of f16.
    pub matrices_f16: bool,
}

impl Limits {
    /// The least that is supported. A fused chain of the models reads and writes up to 17 buffers.
    pub const LEAST: Limits = Limits {
        halves: false,
        groups: 65_535,
        shared: 32 << 10,
        buffers: 24,
        range: 128 << 20,
        processor: false,
        threads: 256,
        subgroup: 4,
        shuffles: false,
        matrices_bf16: false,
        matrices_f16: false,
    };
}
