//! Backends of Moebius: each runs a plan of the IR on one kind of device. This is the only crate with `unsafe`.
//!
//! # The contract of a backend
//!
//! ```text
//! Graph --Backend::plan--> Plan --Backend::compile--> Executable --instantiate--> Instance --run(store)--> outputs
//! ```
//! - **plan** is also the support check: the function that decides how a node is launched decides whether it can be,
//!   so the two cannot drift. A backend may refuse, naming every node it cannot run at once; it never falls back silently.
//! - **compile** prepares launches. An [`Executable`] is immutable; it can be instantiated several times.
//! - **instantiate** allocates the arena, once. An [`Instance`] holds feeds and outputs of one run at a time.
//! - **run** allocates nothing, reads no value back, and leaves every parameter and state in the [`Store`] it is given.
//! - A [`Store`] holds parameters and state by name. Several instances (a training step, an evaluation, a decoding step)
//!   work on one store, one after the other: `run` borrows it mutably.
//! - Same inputs, same bits: a run's results do not depend on timing or on the number of threads.

#[cfg(any(feature = "cuda", feature = "vulkan"))]
mod cache;
#[cfg(any(feature = "cuda", feature = "vulkan"))]
mod chain;
#[cfg(any(feature = "cuda", feature = "vulkan"))]
mod device_store;
mod error;
#[cfg(any(feature = "cuda", feature = "vulkan"))]
mod finite;
mod joined;
mod lowering;
mod mapped;
mod places;
mod stored;
#[cfg(any(feature = "cuda", feature = "vulkan"))]
mod views;

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "vulkan")]
pub mod vulkan;

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use moebius_ir::{Graph, Node, NodeId, Plan, Site, TensorType, Value};

pub use error::{Error, Refusal, Result};
pub use mapped::MappedFile;

/// A kind of device that can run plans.
pub trait Backend: Send + Sync {
    /// Name of the backend: `cpu`, `cuda` or `vulkan`.
    fn name(&self) -> &'static str;

    /// What the device is, in words: model, cores, memory.
    fn describe(&self) -> String;

    /// Orders `graph` and places its buffers.
    ///
    /// # Errors
    /// [`Error::Unsupported`] listing every node this backend cannot run; [`Error::Ir`] if the graph cannot be ordered.
    fn plan(&self, graph: Graph) -> Result<Plan>;

    /// Prepares every launch of a plan made by this backend.
    ///
    /// # Errors
    /// [`Error::Unsupported`] as for [`Backend::plan`].
    fn compile(&self, plan: Plan) -> Result<Arc<dyn Executable>>;

    /// Makes ready what the launches of these optimised graphs need, such as kernels that have to be compiled first, side by side
    /// where one graph after another would take longer. Graphs that the backend refuses are passed over; running does not need
    /// this. A backend that compiles nothing leaves the graphs alone.
    ///
    /// # Errors
    /// What cannot be made.
    fn prepare(&self, graphs: &mut dyn Iterator<Item = Graph>) -> Result<()> {
        let _ = graphs;
        Ok(())
    }

    /// Bytes that can be allocated on the device now, where that can be told.
    fn free_memory(&self) -> Option<u64>;

    /// What happened since this was last asked that stopped nothing but that people may want to know, such as a damaged file
    /// of a cache that was made anew.
    fn take_notes(&self) -> Vec<String>;

    /// An empty store on this device.
    fn new_store(&self) -> Box<dyn Store>;

    /// The same device with memory checks: every buffer is filled with NaN before it is written, and has a fence that is looked
    /// at after each step ([`Error::Fence`]). Results have the same bits. `None` if the backend has no such mode.
    fn checked(&self) -> Option<Arc<dyn Backend>>;
}

/// A compiled plan.
pub trait Executable: Send + Sync {
    /// The plan it runs.
    fn plan(&self) -> &Plan;

    /// Allocates the arena and writes the constants.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the device cannot hold the arena.
    fn instantiate(&self) -> Result<Box<dyn Instance>>;
}

/// A compiled plan with memory of its own.
pub trait Instance: Send {
    /// Gives a feed its value for the following runs: little-endian, row-major bytes. A feed never given is zero.
    ///
    /// # Errors
    /// [`Error::NoSuch`] for an unknown name, [`Error::Bytes`] for a wrong length.
    fn write(&mut self, feed: &str, bytes: &[u8]) -> Result<()>;

    /// Runs every step once. A device that works beside the host may still be at it when this returns.
    ///
    /// # Errors
    /// [`Error::NoSuch`] or [`Error::StoredType`] if the store does not hold what the graph wants; [`Error::Kernel`] if a
    /// kernel rejects a value, such as a token id beyond the vocabulary; a device beside the host tells that from
    /// [`Instance::read`].
    fn run(&mut self, store: &mut dyn Store) -> Result<()>;

    /// Runs every step so many times, one run after another, as [`Instance::run`] does once; a device gets them together where that costs
    /// less.
    ///
    /// # Errors
    /// As [`Instance::run`].
    fn run_times(&mut self, store: &mut dyn Store, times: usize) -> Result<()> {
        (0..times).try_for_each(|_| self.run(store))
    }

    /// Copies an output of the last run into `out`.
    ///
    /// # Errors
    /// [`Error::NoSuch`] for an unknown name, [`Error::Bytes`] for a wrong length, [`Error::Kernel`] as for
    /// [`Instance::run`].
    fn read(&self, output: &str, out: &mut [u8]) -> Result<()>;

    /// Runs every step once more on the present feeds, looking at each float result, and stops at the first that holds a
    /// NaN or an infinity. For diagnosis: slow, and as `run` it carries out updates up to that step.
    ///
    /// # Errors
    /// As [`Instance::run`].
    fn first_non_finite(&mut self, store: &mut dyn Store) -> Result<Option<NonFinite>>;

    /// Runs every step once and gives the seconds of each node that was launched, in the order of the plan.
    ///
    /// # Errors
    /// As [`Instance::run`].
    fn profile(&mut self, store: &mut dyn Store) -> Result<Vec<(NodeId, f64)>>;
}

/// The first tensor of a run with a value that is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// Op that computed it.
    pub op: &'static str,
    /// Model part it belongs to.
    pub scope: String,
    /// The line of model code.
    pub site: Site,
    /// Its type.
    pub ty: TensorType,
    /// Flat index of the first such element.
    pub index: usize,
    /// The element.
    pub value: f32,
}

impl NonFinite {
    /// That of `value`, a result of `node`, whose element `index` is `element`.
    pub(crate) fn of(graph: &Graph, node: &Node, value: Value, (index, element): (usize, f32)) -> NonFinite {
        NonFinite {
            op: node.op.name(),
            scope: node.scope.to_string(),
            site: node.site.clone(),
            ty: graph.ty(value).clone(),
            index,
            value: element,
        }
    }
}

/// Parameters and state by name, on the device.
pub trait Store: Send {
    /// Adds a zeroed tensor, replacing one of the same name.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn insert(&mut self, name: &str, ty: &TensorType) -> Result<()>;

    /// Drops a tensor and its memory; whether it was there.
    fn remove(&mut self, name: &str) -> bool;

    /// Type of a tensor.
    fn ty(&self, name: &str) -> Option<&TensorType>;

    /// Names of all tensors, sorted.
    fn names(&self) -> Vec<&str>;

    /// Overwrites a tensor with little-endian, row-major bytes.
    ///
    /// # Errors
    /// [`Error::NoSuch`], [`Error::Bytes`].
    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()>;

    /// Overwrites the part of a tensor that begins `at` bytes after its start, so that a large one can be had piece by piece.
    ///
    /// # Errors
    /// [`Error::NoSuch`]; [`Error::Part`] if the tensor ends before the part does.
    fn write_part(&mut self, name: &str, at: usize, bytes: &[u8]) -> Result<()>;

    /// The bytes of a tensor; borrowed where the device's memory is the host's.
    ///
    /// # Errors
    /// [`Error::NoSuch`].
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>>;

    /// For the backend's own instances to find their kind of store again.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}
