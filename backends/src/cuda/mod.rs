//! The CUDA backend: every op on an NVIDIA GPU of compute capability 8.0 or newer.
//!
//! Nothing of CUDA is linked. [`driver`] loads the driver when a GPU is asked for, [`compiler`] NVRTC, which compiles the
//! kernels of `kernels/` at first use; [`cache`](crate::cache) keeps them on disk. [`lower`](lower::lower) turns a node into kernels with
//! their arguments (and is the support check), `executable` binds them to a plan, `instance` runs it: as one recorded graph
//! that is replayed. The host reads nothing back between steps and waits for
//! none; rejected values are noted on the GPU and told when an output
//! is read.

mod chip;
#[cfg(test)]
mod combined_tests;
mod compiler;
mod device;
mod driver;
mod error;
mod executable;
mod instance;
mod launch;
mod lower;
mod memory;
mod recording;
mod source;
mod tasks;

use std::sync::Arc;

use moebius_ir::{Fences, Graph, NodeId, Op, Plan};

use crate::joined::Beside;
use crate::{Backend, Executable, Result, Store, lowering};

pub use chip::Chip;
pub use compiler::Compiler;
pub use driver::DriverCalls;
pub use error::CudaError;

const BACKEND: &str = "cuda";

/// The CUDA backend on one GPU.
pub struct Cuda {
    device: Arc<device::Device>,
    checks: bool,
}

/// A kernel's text as NVRTC takes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelText {
    /// Its file, and what was defined.
    pub title: String,
    /// The whole text.
    pub text: String,
    /// The compiler's options.
    pub options: Vec<&'static str>,
}

impl Cuda {
    /// How many GPUs the driver shows.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::OldDriver`], [`CudaError::Driver`].
    pub fn count() -> Result<usize, CudaError> {
        device::count()
    }

    /// The GPU of this number, from 0.
    ///
    /// # Errors
    /// [`CudaError::NoDevice`], [`CudaError::OldDevice`], [`CudaError::NoCompiler`] and those of [`Cuda::count`].
    pub fn open(ordinal: usize) -> Result<Cuda, CudaError> {
        Ok(Cuda { device: Arc::new(device::Device::open(ordinal)?), checks: false })
    }

    /// Whether every buffer gets a fence that is looked at after each step, and is filled with NaN before it is written. Then
    /// steps are waited for one by one.
    #[must_use]
    pub fn with_checks(mut self, checks: bool) -> Cuda {
        self.checks = checks;
        self
    }

    /// How often the driver was called since the GPU was opened, over all sessions on it.
    pub fn calls(&self) -> DriverCalls {
        self.device.counter.calls()
    }

    /// Number of the GPU, from 0.
    pub fn ordinal(&self) -> usize {
        self.device.ordinal
    }

    /// The kernels that an optimised graph needs on such a GPU, each once. Needs no GPU.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`].
    pub fn kernels(graph: &Graph, chip: Chip) -> Result<Vec<KernelText>> {
        let mut texts = Vec::new();
        let plan = planned(graph.clone(), chip, Fences::Off)?;
        let joined = launches(graph, chip, &|id| Beside::of(&plan, id))?;
        // The order of a plan decides what can be joined: what is may need a kernel of its own elsewhere.
        for launch in launches(graph, chip, &alone)?.into_iter().chain(joined) {
            for action in launch.actions {
                if let launch::Action::Kernel(k) = action {
                    let (title, text, options) = (k.source.title(), k.source.text(), k.source.options().to_vec());
                    texts.push(KernelText { title, text, options });
                }
            }
        }
        texts.sort();
        texts.dedup();
        Ok(texts)
    }

    /// For every product of an optimised graph, on such a GPU and in the order of the graph: its result, its kernels, their tiles (rows x
    /// columns x elements of k), the rule with its numbers, and the chain that is joined onto it. Needs no GPU.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`], [`crate::Error::Graph`].
    pub fn explain(graph: Graph, chip: Chip) -> Result<Vec<String>> {
        let plan = planned(graph, chip, Fences::Off)?;
        let (graph, launches) = (plan.graph(), launches(plan.graph(), chip, &|id| Beside::of(&plan, id))?);
        let lines = graph.nodes_with_ids().zip(&launches).filter_map(|((id, node), launch)| {
            let why = launch.why.as_ref()?;
            let kernels = launch.actions.iter().filter_map(|action| match action {
                launch::Action::Kernel(k) => Some(k.name),
                launch::Action::Tasks(_) | launch::Action::Clear { .. } => None,
            });
            let (ty, kernels) = (graph.ty(node.results[0]), kernels.collect::<Vec<_>>().join(" + "));
            let Beside { before, route, behind, twin, combined, behind_combined, .. } =
                Beside::of(&plan, id).unwrap_or_default();
            let name = |id| graph.node(id).op.name();
            let of = match (before, route) {
                (None, _) => String::new(),
                (Some(before), None) => format!("; with the {} before it", name(before)),
                (Some(before), Some(route)) => format!("; with the {} and the {} before it", name(route), name(before)),
            };
            let chain = match behind.map(|id| &graph.node(id).op) {
                None => "",
                Some(Op::GlobalNorm(_)) => "; with the norm behind it",
                Some(_) => "; with the chain behind it",
            };
            let twin = if twin.is_some() { "; with its twin" } else { "" };
            let combine = match (combined, behind_combined) {
                (None, _) => "",
                (Some(_), None) => "; with the combine behind it",
                (Some(_), Some(_)) => "; with the combine behind it and the chain behind that",
            };
            Some(format!("{} {ty}: {kernels}, {why}{of}{chain}{twin}{combine}", node.op.name()))
        });
        Ok(lines.collect())
    }

    /// What decides on a GPU's kernels.
    pub fn chip(&self) -> Chip {
        self.device.chip
    }
}

/// The plan of a graph on such a GPU.
fn planned(graph: Graph, chip: Chip, fences: Fences) -> Result<Plan> {
    let by_itself: Vec<usize> = launches(&graph, chip, &alone)?.iter().map(|l| l.scratch).collect();
    let join = |graph: &Graph, node: NodeId| lower::joined(graph, node, chip);
    let lowered = |graph: &Graph, id, beside| lower::lower(graph, id, beside, chip).map_or(0, |l| l.scratch);
    let scratch = |plan: &Plan, id: NodeId| Beside::scratch(plan, id, &by_itself, &lowered);
    Ok(Plan::with_joined(graph, &scratch, &join, fences)?)
}

/// The launch of every node, or all refusals; what `beside` gives nothing for is done with another node.
fn launches(graph: &Graph, chip: Chip, beside: &dyn Fn(NodeId) -> Option<Beside>) -> Result<Vec<launch::Launch>> {
    lowering::launches_with(BACKEND, graph, beside, |id, beside| lower::lower(graph, id, beside, chip))
}

/// Each node by itself.
fn alone(_: NodeId) -> Option<Beside> {
    Some(Beside::default())
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        BACKEND
    }

    fn describe(&self) -> String {
        let (device, (major, minor)) = (&self.device, self.device.capability);
        let nvrtc = device.compiler_version();
        format!(
            "{}, compute capability {major}.{minor}, {:.1} GB, NVRTC {}.{}",
            device.name,
            device.total as f64 / 1e9,
            nvrtc.0,
            nvrtc.1
        )
    }

    fn plan(&self, graph: Graph) -> Result<Plan> {
        planned(graph, self.device.chip, if self.checks { Fences::On } else { Fences::Off })
    }

    fn compile(&self, plan: Plan) -> Result<Arc<dyn Executable>> {
        let launches = launches(plan.graph(), self.device.chip, &|id| Beside::of(&plan, id))?;
        Ok(Arc::new(executable::CudaExecutable::new(Arc::clone(&self.device), plan, launches, self.checks)?))
    }

    fn prepare(&self, graphs: &mut dyn Iterator<Item = Graph>) -> Result<()> {
        let taken = graphs.filter_map(|graph| {
            let plan = self.plan(graph).ok()?;
            launches(plan.graph(), self.device.chip, &|id| Beside::of(&plan, id)).ok()
        });
        let actions = taken.flatten().flat_map(|launch| launch.actions);
        let kernel = |action| if let launch::Action::Kernel(k) = action { Some(k.source) } else { None };
        let sources: Vec<source::Source> = actions.filter_map(kernel).collect();
        self.device.modules(&sources.iter().collect::<Vec<_>>())?;
        Ok(())
    }

    fn free_memory(&self) -> Option<u64> {
        self.device.free().ok()
    }

    fn take_notes(&self) -> Vec<String> {
        self.device.take_notes()
    }

    fn checked(&self) -> Option<Arc<dyn Backend>> {
        Some(Arc::new(Cuda { device: Arc::clone(&self.device), checks: true }))
    }

    fn new_store(&self) -> Box<dyn Store> {
        Box::new(memory::CudaStore::new(Arc::clone(&self.device)))
    }
}
