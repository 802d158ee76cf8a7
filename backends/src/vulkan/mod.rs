//! The Vulkan backend: any GPU with a driver for Vulkan 1.2, and processors through one such as lavapipe.
//!
//! Nothing of Vulkan is linked: [`loader`] looks for the loader when a device is asked for. [`shader`] puts the text of a kernel
//! together, [`spirv`] translates it, [`pipelines`] has the driver compile it and keeps that on disk. [`lower`](lower::lower) turns a
//! node into kernels with their arguments (and is the support check), `executable` binds them to a plan, `instance` runs it: as
//! one sequence of commands, recorded once and submitted for each run. The host reads nothing back between steps and waits for
//! none; rejected values are noted on the device and told when an output is read.

mod commands;
mod cooperative;
#[cfg(test)]
mod cooperative_tests;
mod device;
mod error;
mod executable;
mod hazards;
mod instance;
#[cfg(test)]
mod interpreter;
#[cfg(test)]
mod lanes_tests;
mod launch;
mod limits;
mod loader;
mod lower;
mod matrices;
mod memory;
mod pipelines;
mod shader;
mod spirv;

use std::sync::Arc;

use moebius_ir::{DType, Fences, Graph, NodeId, Plan, Reuse};

use self::launch::Launch;
use crate::cache::Cache;
use crate::joined::Beside;
use crate::{Backend, Executable, Result, Store, lowering};

pub use error::VulkanError;
pub use limits::Limits;
pub use loader::Choice;

const BACKEND: &str = "vulkan";

/// The Vulkan backend on one device.
pub struct Vulkan {
    device: Arc<device::Device>,
    checks: bool,
}

/// A kernel's text in WGSL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShaderText {
    /// Its file.
    pub title: String,
    /// The whole text.
    pub text: String,
    /// The dtype of the factors of its cooperative matrices, if it has any.
    pub cooperative: Option<DType>,
}

impl ShaderText {
    /// Its words in SPIR-V, as a device is given them.
    ///
    /// # Errors
    /// [`VulkanError::Shader`].
    pub fn translate(&self) -> Result<Vec<u32>, VulkanError> {
        let failed = |log| VulkanError::Shader { shader: self.title.clone(), log };
        spirv::compile(&self.text, self.cooperative, true).map_err(failed)
    }
}

impl Vulkan {
    /// How many devices the loader shows.
    ///
    /// # Errors
    /// [`VulkanError::NoLoader`], [`VulkanError::NoDriver`], [`VulkanError::Driver`].
    pub fn count() -> Result<usize, VulkanError> {
        Ok(loader::load(false)?.devices()?.len())
    }

    /// The device that is wanted.
    ///
    /// # Errors
    /// [`VulkanError::NoDevice`], [`VulkanError::OldDevice`] and those of [`Vulkan::count`].
    pub fn open(choice: &Choice) -> Result<Vulkan, VulkanError> {
        Vulkan::with(choice, false, Cache::of_user("pipeline"))
    }

    /// The device with the validation layer between, where that is installed: what it objects to is then an error of the next run.
    ///
    /// # Errors
    /// As [`Vulkan::open`].
    pub fn open_validated(choice: &Choice) -> Result<Vulkan, VulkanError> {
        Vulkan::with(choice, Vulkan::has_validation(), Cache::of_user("pipeline"))
    }

    fn with(choice: &Choice, validated: bool, cache: Cache) -> Result<Vulkan, VulkanError> {
        Ok(Vulkan { device: Arc::new(device::Device::open(choice, validated, cache)?), checks: false })
    }

    /// Whether the validation layer is installed.
    pub fn has_validation() -> bool {
        loader::has_validation()
    }

    /// Whether every buffer gets a fence that is looked at after each step, and is filled with NaN before it is written. Then
    /// steps are waited for one by one.
    #[must_use]
    pub fn with_checks(mut self, checks: bool) -> Vulkan {
        self.checks = checks;
        self
    }

    /// Number of the device, from 0.
    pub fn ordinal(&self) -> usize {
        self.device.ordinal
    }

    /// Whether it is a card of its own, as opposed to a processor or the graphics of one.
    pub fn is_discrete(&self) -> bool {
        self.device.discrete
    }

    /// What the lowering asks of it.
    pub fn limits(&self) -> Limits {
        self.device.limits
    }

    /// The kernels that an optimised graph needs on such a device, each once. Needs no device.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`], or that of the plan.
    pub fn kernels(graph: &Graph, limits: Limits) -> Result<Vec<ShaderText>> {
        let plan = planned(graph.clone(), limits, Fences::Off)?;
        let mut texts = Vec::new();
        for launch in launches(plan.graph(), |id| Beside::of(&plan, id), limits)? {
            for action in launch.actions {
                if let launch::Action::Kernel(k) = action {
                    let shader::Source { title, text, cooperative, .. } = k.source;
                    texts.push(ShaderText { title, text, cooperative });
                }
            }
        }
        texts.sort();
        texts.dedup();
        Ok(texts)
    }

    /// How many commands a run of an optimised graph is on such a device, and how many of them wait for those before them. Needs no
    /// device.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`], or that of the plan.
    pub fn commands(graph: Graph, limits: Limits) -> Result<[usize; 2]> {
        let plan = planned(graph, limits, Fences::Off)?;
        let launches = launches(plan.graph(), |id| Beside::of(&plan, id), limits)?;
        Ok(hazards::count(&plan, &launches))
    }
}

/// The launch of every node, or all refusals; what `beside` gives nothing for is done with another node.
fn launches(graph: &Graph, beside: impl Fn(NodeId) -> Option<Beside>, limits: Limits) -> Result<Vec<Launch>> {
    lowering::launches_with(BACKEND, graph, beside, |id, beside| lower::lower(graph, id, beside, limits))
}

/// The plan of a graph for such a device.
fn planned(graph: Graph, limits: Limits, fences: Fences) -> Result<Plan> {
    let by_itself: Vec<usize> =
        launches(&graph, |_| Some(Beside::default()), limits)?.iter().map(|l| l.scratch).collect();
    let lowered = |graph: &Graph, id, beside| lower::lower(graph, id, beside, limits).map_or(0, |l| l.scratch);
    let scratch = |plan: &Plan, id: NodeId| Beside::scratch(plan, id, &by_itself, &lowered);
    let join = |graph: &Graph, id| lower::joined(graph, id, limits);
    let reuse = Reuse::Later { bytes: hazards::LATER_BYTES, steps: hazards::AHEAD };
    Ok(Plan::with_reuse(graph, &scratch, &join, fences, reuse)?)
}

impl Backend for Vulkan {
    fn name(&self) -> &'static str {
        BACKEND
    }

    fn describe(&self) -> String {
        self.device.describe()
    }

    fn plan(&self, graph: Graph) -> Result<Plan> {
        planned(graph, self.device.limits, if self.checks { Fences::On } else { Fences::Off })
    }

    fn compile(&self, plan: Plan) -> Result<Arc<dyn Executable>> {
        let launches = launches(plan.graph(), |id| Beside::of(&plan, id), self.device.limits)?;
        Ok(Arc::new(executable::VulkanExecutable::new(Arc::clone(&self.device), plan, launches, self.checks)?))
    }

    fn prepare(&self, graphs: &mut dyn Iterator<Item = Graph>) -> Result<()> {
        let taken = graphs.filter_map(|graph| {
            let plan = planned(graph, self.device.limits, Fences::Off).ok()?;
            launches(plan.graph(), |id| Beside::of(&plan, id), self.device.limits).ok()
        });
        let actions = taken.flatten().flat_map(|launch| launch.actions);
        let kernel = |action| if let launch::Action::Kernel(k) = action { Some(k.source) } else { None };
        let sources: Vec<shader::Source> = actions.filter_map(kernel).collect();
        self.device.pipelines(&sources.iter().collect::<Vec<_>>())?;
        Ok(())
    }

    fn free_memory(&self) -> Option<u64> {
        Some(self.device.free())
    }

    fn take_notes(&self) -> Vec<String> {
        self.device.take_notes()
    }

    fn checked(&self) -> Option<Arc<dyn Backend>> {
        Some(Arc::new(Vulkan { device: Arc::clone(&self.device), checks: true }))
    }

    fn new_store(&self) -> Box<dyn Store> {
        Box::new(memory::VulkanStore::new(Arc::clone(&self.device)))
    }
}

#[cfg(test)]
mod tests {
    use moebius_ir::TensorType;

    use super::*;

    /// Twice the numbers 0, 1, 2, .. by a device whose kernels are kept in this folder; what the device notes.
    fn doubled(folder: &std::path::Path) -> Vec<String> {
        let vulkan = Vulkan::with(&Choice::Best, false, Cache::at(folder)).unwrap();
        let mut graph = Graph::new();
        let x = graph.feed("x", TensorType::f32([300])).unwrap();
        let y = graph.add(x, x).unwrap();
        graph.output("y", y).unwrap();
        let plan = vulkan.plan(moebius_ir::passes::optimise(&graph).unwrap()).unwrap();
        let mut instance = vulkan.compile(plan).unwrap().instantiate().unwrap();
        let mut store = vulkan.new_store();
        for turn in 0..3 {
            let bytes: Vec<u8> = (0..300).flat_map(|i| ((i + turn) as f32).to_le_bytes()).collect();
            instance.write("x", &bytes).unwrap();
            instance.run(store.as_mut()).unwrap();
            let mut out = vec![0; 1200];
            instance.read("y", &mut out).unwrap();
            let wanted: Vec<u8> = (0..300).flat_map(|i| (2.0 * (i + turn) as f32).to_le_bytes()).collect();
            assert_eq!(out, wanted);
        }
        vulkan.take_notes()
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "a test that did nothing should say so")]
    fn a_damaged_kernel_on_disk_is_told_and_made_anew() {
        if !Vulkan::count().is_ok_and(|n| n > 0) {
            eprintln!("no Vulkan device: nothing is run");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(doubled(folder.path()), Vec::<String>::new());
        let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let whole = std::fs::read(&files[0]).unwrap();
        // Whole, it is taken without a word.
        assert_eq!(doubled(folder.path()), Vec::<String>::new());
        std::fs::write(&files[0], &whole[..whole.len() - 1]).unwrap();
        let notes = doubled(folder.path());
        assert!(notes.len() == 1 && notes[0].contains("damaged"), "{notes:?}");
        assert_eq!(doubled(folder.path()), Vec::<String>::new());
    }

    #[test]
    fn a_device_that_is_not_there_is_a_typed_error() {
        for choice in [Choice::Number(1000), Choice::Named("no such device".into())] {
            let Err(error) = Vulkan::open(&choice) else { panic!("{choice:?}") };
            let known =
                matches!(error, VulkanError::NoLoader { .. } | VulkanError::NoDriver | VulkanError::NoDevice { .. });
            assert!(known && !error.to_string().is_empty(), "{error}");
        }
    }
}
