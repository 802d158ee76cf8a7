//! What the lowering asks of a GPU.

/// A kind of GPU, as far as the choice of kernels depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chip {
    /// It has wgmma and the tensor memory accelerator (compute capability 9.0).
    pub hopper: bool,
    /// Multiprocessors.
    pub processors: usize,
}

impl Chip {
    /// The least that is supported: compute capability 8.0, as an A100.
    pub const AMPERE: Chip = Chip { hopper: false, processors: 108 };
    /// An H100.
    pub const HOPPER: Chip = Chip { hopper: true, processors: 132 };
}
