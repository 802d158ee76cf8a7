//! What can go wrong in a backend.

use moebius_ir::{Site, TensorType};

/// Result of a backend function.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A node that a backend cannot run.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// Its op.
    pub op: &'static str,
    /// Types of its operands.
    pub operands: Vec<TensorType>,
    /// What the backend would need instead.
    pub wanted: String,
    /// Where the node was made.
    pub site: Site,
}

fn list(refusals: &[Refusal]) -> String {
    let line = |r: &Refusal| {
        let operands = r.operands.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        format!("\n  {}({operands}) at {}: wanted {}", r.op, r.site, r.wanted)
    };
    refusals.iter().map(line).collect()
}

/// An amount of memory as people read it: in the largest unit of which there is at least a tenth.
pub(crate) fn memory(bytes: u64) -> String {
    let units = [("GB", 1e9), ("MB", 1e6)];
    let (unit, size) = units.into_iter().find(|(_, size)| bytes as f64 >= size / 10.0).unwrap_or(("kB", 1e3));
    format!("{:.2} {unit}", bytes as f64 / size)
}

/// An error of a backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The graph itself is at fault.
    #[error(transparent)]
    Ir(#[from] moebius_ir::Error),
    /// Nodes that this backend cannot run, all of them.
    #[error("{backend} cannot run {} of the graph's nodes:{}", refusals.len(), list(refusals))]
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// Every node it refuses.
        refusals: Vec<Refusal>,
    },
    /// The device cannot hold a buffer.
    #[error("{backend}: {what} needs {bytes} bytes, which could not be had")]
    OutOfMemory {
        /// Name of the backend.
        backend: &'static str,
        /// What the memory is for.
        what: String,
        /// How much it takes.
        bytes: usize,
    },
    /// The device has too little memory for a program; nothing was allocated.
    #[error(
        "{backend}: the program needs {} ({} of parameters and state, {} of activations and scratch), {} are free",
        memory(state.saturating_add(*arena)), memory(*state), memory(*arena), memory(*free)
    )]
    TooLarge {
        /// Name of the backend.
        backend: &'static str,
        /// Bytes of parameters and state that are not there yet.
        state: u64,
        /// Bytes of the arena.
        arena: u64,
        /// Bytes that can be allocated.
        free: u64,
    },
    /// A number of threads that is none.
    #[error("MOEBIUS_THREADS: wanted a number of threads from 1 to {most}, found {found:?}")]
    ThreadCount {
        /// The most that may be asked for.
        most: usize,
        /// What the variable holds.
        found: String,
    },
    /// An instruction set that the processor does not have.
    #[error("MOEBIUS_CPU: wanted an instruction set of this machine ({}), found {found:?}", there.join(", "))]
    InstructionSet {
        /// What the variable holds.
        found: String,
        /// The names of those there are.
        there: Vec<&'static str>,
    },
    /// A name that is not there.
    #[error("no {what} is named {name:?}; there are: {}", there.join(", "))]
    NoSuch {
        /// Feed, output, or stored tensor.
        what: &'static str,
        /// The name asked for.
        name: String,
        /// The names that exist.
        there: Vec<String>,
    },
    /// A buffer of the wrong length.
    #[error("{what} {name:?} of type {ty}: wanted {wanted} bytes, found {found}")]
    Bytes {
        /// Feed, output, or stored tensor.
        what: &'static str,
        /// Its name.
        name: String,
        /// Its type.
        ty: TensorType,
        /// Bytes of that type.
        wanted: usize,
        /// Bytes given.
        found: usize,
    },
    /// A part that lies beyond the end of a stored tensor.
    #[error("stored tensor {name:?} of type {ty} has {} bytes: wanted a part of it, found {found} bytes from byte {at} on", ty.bytes())]
    Part {
        /// Its name.
        name: String,
        /// Its type.
        ty: TensorType,
        /// Where the part begins.
        at: usize,
        /// Bytes of the part.
        found: usize,
    },
    /// The store holds a tensor of another type than the graph wants.
    #[error("stored tensor {name:?}: the graph wants {wanted}, the store holds {found}")]
    StoredType {
        /// Its name.
        name: String,
        /// What the graph wants.
        wanted: TensorType,
        /// What is there.
        found: TensorType,
    },
    /// An instance was given the store of another backend.
    #[error("{backend}: the store given to run belongs to another backend")]
    ForeignStore {
        /// Name of the instance's backend.
        backend: &'static str,
    },
    /// A kernel rejected a value.
    #[error("{op} at {site}: {wanted}; found {found}")]
    Kernel {
        /// The op.
        op: &'static str,
        /// Where the node was made.
        site: Site,
        /// What the kernel wants.
        wanted: String,
        /// What it was given.
        found: String,
    },
    /// A kernel wrote outside its buffers: a bug of the backend, found because checks are on.
    #[error("{op} at {site} wrote past the end of a buffer")]
    Fence {
        /// The op.
        op: &'static str,
        /// Where the node was made.
        site: Site,
    },
    /// An NVIDIA GPU, its driver or its compiler is at fault.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// A device with a Vulkan driver, or that driver, is at fault.
    #[cfg(feature = "vulkan")]
    #[error(transparent)]
    Vulkan(#[from] crate::vulkan::VulkanError),
    /// The threads of the CPU backend could not be started.
    #[error("wanted {wanted} threads: {source}")]
    Threads {
        /// How many.
        wanted: usize,
        /// Why not.
        source: std::io::Error,
    },
}
