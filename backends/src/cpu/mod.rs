//! The CPU backend: every op on all cores, with vector instructions chosen at run time.
//!
//! [`lower`](lower::lower) turns a node into a launch (and is the support check), `instance` carries a plan's launches out,
//! `gemm` is the matrix product under every dense and expert op, `kernels` holds one file per op over plain slices.

pub mod crew;
pub mod element;
mod free;
pub mod gemm;
mod instance;
pub mod kernels;
mod lower;
mod memory;
pub mod vmath;

use std::sync::Arc;

use self::crew::Crew;
use moebius_ir::{Fences, Graph, NodeId, Plan};

use crate::{Backend, Error, Executable, Result, Store, lowering};

const BACKEND: &str = "cpu";

/// Most threads that the environment may ask for: more than any machine has.
const MOST_THREADS: usize = 4096;

/// The CPU backend with threads of its own.
pub struct Cpu {
    crew: Arc<Crew>,
    checks: bool,
    instruction_set: &'static str,
}

impl Cpu {
    /// The backend on `threads` threads; `None` means as many as the variable `MOEBIUS_THREADS` says, else one per available core. In
    /// builds with debug assertions, memory is checked as by [`Cpu::with_checks`].
    ///
    /// # Errors
    /// [`Error::Threads`] if the threads cannot be started; [`Error::ThreadCount`] if `MOEBIUS_THREADS` is no number of threads;
    /// [`Error::InstructionSet`] if `MOEBIUS_CPU` names one that the machine does not have.
    pub fn new(threads: Option<usize>) -> Result<Cpu> {
        let instruction_set = gemm::instruction_set()?;
        let wanted = threads.map_or_else(threads_of_environment, Ok)?;
        let crew = Crew::new(wanted).map_err(|source| Error::Threads { wanted, source })?;
        Ok(Cpu { crew: Arc::new(crew), checks: cfg!(debug_assertions), instruction_set })
    }

    /// Whether every buffer gets a fence that is looked at after each step, and is filled with NaN before it is written.
    #[must_use]
    pub fn with_checks(mut self, checks: bool) -> Cpu {
        self.checks = checks;
        self
    }

    /// Threads that kernels run on, that of the caller included.
    pub fn threads(&self) -> usize {
        self.crew.threads()
    }

    /// The launch of every node, or all refusals; with the chains that `joined` joins onto nodes.
    fn launches(&self, graph: &Graph, joined: impl Fn(NodeId) -> Option<NodeId>) -> Result<Vec<lower::Launch>> {
        lowering::launches(BACKEND, graph, |id| lower::lower(graph, id, joined(id), self.threads()))
    }
}

/// What `MOEBIUS_THREADS` asks for, else one thread for each core that this process may use.
fn threads_of_environment() -> Result<usize> {
    let Some(asked) = std::env::var_os("MOEBIUS_THREADS") else {
        return Ok(std::thread::available_parallelism().map_or(1, |n| n.get()));
    };
    let number = asked.to_str().and_then(|text| text.parse().ok()).filter(|n| (1..=MOST_THREADS).contains(n));
    number.ok_or_else(|| Error::ThreadCount { most: MOST_THREADS, found: asked.to_string_lossy().into_owned() })
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        BACKEND
    }

    fn describe(&self) -> String {
        format!("{} threads, {}", self.threads(), self.instruction_set)
    }

    fn plan(&self, graph: Graph) -> Result<Plan> {
        let scratch: Vec<usize> = self.launches(&graph, |_| None)?.iter().map(|l| l.scratch).collect();
        let fences = if self.checks { Fences::On } else { Fences::Off };
        Ok(Plan::with_joined(graph, &|_, node: NodeId| scratch[node.index()], &crate::joined::joined, fences)?)
    }

    fn compile(&self, plan: Plan) -> Result<Arc<dyn Executable>> {
        let launches = self.launches(plan.graph(), |id| plan.joined(id))?;
        Ok(Arc::new(instance::CpuExecutable::new(plan, launches, Arc::clone(&self.crew), self.checks)))
    }

    fn free_memory(&self) -> Option<u64> {
        free::free_memory()
    }

    fn take_notes(&self) -> Vec<String> {
        Vec::new()
    }

    fn new_store(&self) -> Box<dyn Store> {
        Box::new(memory::CpuStore::new())
    }

    fn checked(&self) -> Option<Arc<dyn Backend>> {
        Some(Arc::new(Cpu { crew: Arc::clone(&self.crew), checks: true, ..*self }))
    }
}
