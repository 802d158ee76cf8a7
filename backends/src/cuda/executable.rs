//! A compiled plan: every step with its loaded kernels, and how they are put on the stream.

use std::ffi::c_void;
use std::sync::Arc;

use cust::module::Module;
use cust::sys;
use moebius_ir::{NodeId, Op, Plan, Step, Storage, Value};

use super::device::Device;
use super::driver::{Counter, Shape, check, describe, failed, launch};
use super::instance::CudaInstance;
use super::launch::{Action, Arg, Joint, Launch};
use super::memory::Memory;
use super::source::Source;
use super::tasks::{Table, Touched};
use crate::joined::Beside;
use crate::lowering::Rejects;
use crate::places::{Place, StepPlaces, of_step, place, states};
use crate::{Executable, Instance, Result};

/// A function of a loaded module.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Function(sys::CUfunction);
// SAFETY: a handle of the driver, which may be used from any thread; the module is kept beside it.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// An [`Action`] with its kernel loaded.
enum Bound {
    Kernel { function: Function, grid: [u32; 3], threads: u32, shared: u32, args: Vec<Arg> },
    Tasks { function: Function, threads: u32, table: Table },
    Clear { at: Arg, bytes: usize },
}

/// A step that runs a node, or several that are joined.
pub(super) struct Launched {
    pub(super) node: NodeId,
    /// The nodes of other steps whose tasks this one does too.
    pub(super) joined: Vec<NodeId>,
    /// The nodes whose results are in memory afterwards, of itself and those beside it, in order: one may be all that reads another's.
    pub(super) stored: Vec<NodeId>,
    /// The nodes of the steps before and behind whose work this one does too.
    pub(super) beside: Beside,
    /// Number of the step, from 1: what kernels note a rejection under.
    pub(super) number: i32,
    pub(super) places: StepPlaces,
    pub(super) rejects: Option<Rejects>,
    /// Where its counters begin in an instance's memory for counters, in bytes.
    counters: usize,
    actions: Vec<Bound>,
}

/// A step.
pub(super) enum Work {
    Launch(Box<Launched>),
    Copy { from: Place, to: Place, bytes: usize },
}

/// Everything of a compiled plan that instances share.
pub(super) struct Program {
    pub(super) device: Arc<Device>,
    pub(super) plan: Plan,
    pub(super) work: Vec<Work>,
    /// The parameters and states, in the order of the table.
    pub(super) states: Vec<Value>,
    pub(super) checks: bool,
    /// Bytes of the tables of tasks, and of the counters.
    table_bytes: usize,
    counter_bytes: usize,
    /// Holds the code that the functions point to.
    _modules: Vec<Arc<Module>>,
}

/// Where an instance's memory is.
#[derive(Clone, Copy)]
pub(super) struct Addresses<'a> {
    pub(super) arena: u64,
    pub(super) states: &'a [u64],
    pub(super) fault: u64,
    /// Of the tables of tasks.
    pub(super) tables: u64,
    /// Of the launches' counters.
    pub(super) counters: u64,
}

impl Addresses<'_> {
    pub(super) fn of(&self, place: Place) -> u64 {
        match place {
            Place::Arena(offset) => self.arena + offset as u64,
            Place::State(i) => self.states[i],
        }
    }

    /// The bytes of an argument.
    fn value(&self, step: &Launched, arg: &Arg) -> Result<Vec<u8>> {
        Ok(match arg {
            Arg::Operand(i) => self.of(step.places.operands[*i]).to_le_bytes().to_vec(),
            Arg::OperandAt(i, at) => (self.of(step.places.operands[*i]) + *at as u64).to_le_bytes().to_vec(),
            Arg::Result(i) => self.of(step.places.results[*i]).to_le_bytes().to_vec(),
            Arg::ResultAt(i, at) => (self.of(step.places.results[*i]) + *at as u64).to_le_bytes().to_vec(),
            Arg::Scratch(at) => (self.arena + (step.places.scratch.0 + at) as u64).to_le_bytes().to_vec(),
            Arg::Null => 0u64.to_le_bytes().to_vec(),
            Arg::Counters => (self.counters + step.counters as u64).to_le_bytes().to_vec(),
            Arg::Fault => self.fault.to_le_bytes().to_vec(),
            Arg::Step => step.number.to_le_bytes().to_vec(),
            Arg::I32(n) => n.to_le_bytes().to_vec(),
            Arg::U32(n) => n.to_le_bytes().to_vec(),
            Arg::I64(n) => n.to_le_bytes().to_vec(),
            Arg::F32(x) => x.to_le_bytes().to_vec(),
            Arg::Bytes(bytes) => bytes.clone(),
            Arg::Box(tensor) => describe(tensor, self.address(step, &tensor.at)?)?,
        })
    }

    /// The address that an argument is.
    fn address(&self, step: &Launched, arg: &Arg) -> Result<u64> {
        let bytes = self.value(step, arg)?;
        Ok(u64::from_le_bytes(bytes.try_into().unwrap_or_else(|_| unreachable!("only addresses are asked for"))))
    }
}

impl Program {
    /// Puts the kernels of a step on the stream. The first kernel of a run waits for all that is before the run, and with it those behind
    /// it: they may then read what no kernel of the run writes before they wait. `begun`: whether there was one.
    pub(super) fn enqueue(&self, step: &Launched, addresses: Addresses<'_>, begun: &mut bool) -> Result<()> {
        for action in &step.actions {
            match action {
                Bound::Clear { at, bytes } => self.device.fill(addresses.address(step, at)?, 0, *bytes)?,
                Bound::Kernel { function, grid, threads, shared, args } => {
                    let shape = Shape { grid: *grid, threads: *threads, shared: *shared };
                    let values: Result<Vec<_>> = args.iter().map(|arg| addresses.value(step, arg)).collect();
                    self.launch(*function, shape, values?, begun)?;
                }
                Bound::Tasks { function, threads, table } => {
                    let shape = Shape { grid: [table.blocks() as u32, 1, 1], threads: *threads, shared: 0 };
                    let at = (addresses.tables + table.at() as u64).to_le_bytes().to_vec();
                    self.launch(*function, shape, vec![at, (table.len() as i32).to_le_bytes().to_vec()], begun)?;
                }
            }
        }
        Ok(())
    }

    /// Puts a kernel with the bytes of its arguments on the stream.
    fn launch(&self, function: Function, shape: Shape, values: Vec<Vec<u8>>, begun: &mut bool) -> Result<()> {
        // Each argument in words of 16 bytes, the strictest alignment of a struct.
        let values: Vec<Vec<u128>> = values.iter().map(|bytes| words(bytes)).collect();
        let mut pointers: Vec<*mut c_void> = values.iter().map(|v| v.as_ptr().cast_mut().cast()).collect();
        let (stream, early) = (self.device.raw_stream(), *begun && self.device.launches_early);
        // SAFETY: the lowering gives each kernel arguments of its parameters' types, whose addresses are planned memory, and every
        // kernel begins with the wait.
        unsafe { launch(function.0, shape, stream, &mut pointers, early)? };
        Counter::count(&self.device.counter.launches);
        *begun = true;
        Ok(())
    }

    /// The bytes of all tables of tasks.
    pub(super) fn tables(&self, addresses: Addresses<'_>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.table_bytes);
        for work in &self.work {
            let Work::Launch(step) = work else { continue };
            for action in &step.actions {
                if let Bound::Tasks { table, .. } = action {
                    bytes.extend(table.bytes(addresses));
                }
            }
        }
        bytes
    }
}

impl Launched {
    /// The table, if tasks are all that the step does.
    fn tasks(&mut self) -> Option<(Function, &mut Table)> {
        match self.actions.as_mut_slice() {
            [Bound::Tasks { function, table, .. }] => Some((*function, table)),
            _ => None,
        }
    }

    /// Takes over the tasks of another step, if they are for the same kernel.
    fn join(&mut self, other: &mut Launched) -> bool {
        match (self.tasks(), other.tasks()) {
            (Some((own, table)), Some((function, tasks))) if own == function => table.append(tasks),
            _ => return false,
        }
        self.joined.push(other.node);
        true
    }
}

/// Joins neighbouring steps of the same kernel over many tensors, where they do not touch each other's.
fn joined(work: Vec<Work>) -> Vec<Work> {
    let mut joined: Vec<Work> = Vec::with_capacity(work.len());
    let mut touched = None;
    for mut next in work {
        if let (Some(Work::Launch(last)), Work::Launch(step)) = (joined.last_mut(), &mut next)
            && touched.as_mut().is_some_and(|t: &mut Touched| t.joins(&step.places))
            && last.join(step)
        {
            continue;
        }
        touched = if let Work::Launch(step) = &next { Touched::by(&step.places) } else { None };
        joined.push(next);
    }
    joined
}

/// Bytes in words, the last filled up with zeros.
fn words(bytes: &[u8]) -> Vec<u128> {
    let word = |chunk: &[u8]| {
        let mut whole = [0; 16];
        whole[..chunk.len()].copy_from_slice(chunk);
        u128::from_le_bytes(whole)
    };
    bytes.chunks(16).map(word).collect()
}

pub(super) struct CudaExecutable(pub(super) Arc<Program>);

impl CudaExecutable {
    /// Compiles and loads the kernels of every launch of `plan`, one launch for each node of the graph.
    pub(super) fn new(device: Arc<Device>, plan: Plan, launches: Vec<Launch>, checks: bool) -> Result<CudaExecutable> {
        let kernels: Vec<(&Source, &str, usize)> = launches
            .iter()
            .flat_map(|l| &l.actions)
            .filter_map(|action| match action {
                Action::Kernel(k) => Some((&k.source, k.name, k.shared)),
                Action::Tasks(t) => Some((&t.source, t.name, 0)),
                Action::Clear { .. } => None,
            })
            .collect();
        let sources: Vec<_> = kernels.iter().map(|(source, ..)| *source).collect();
        let modules = device.modules(&sources)?;
        let functions = kernels.iter().zip(&modules).map(|(&(_, name, shared), module)| {
            let function = module.get_function(name).map_err(failed("cuModuleGetFunction"))?.to_raw();
            if shared > 0 {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: a function of a live module.
                let result = unsafe { sys::cuFuncSetAttribute(function, attribute, shared as i32) };
                check("cuFuncSetAttribute", result)?;
            }
            Ok(Function(function))
        });
        let mut functions = functions.collect::<Result<Vec<_>>>()?.into_iter();
        let mut launches: Vec<Option<Launch>> = launches.into_iter().map(Some).collect();
        // In the order of the launches, not of the steps.
        let mut functions: Vec<Vec<Function>> = launches
            .iter()
            .flatten()
            .map(|l| functions.by_ref().take(l.actions.iter().filter(|a| a.is_kernel()).count()).collect())
            .collect();
        let states = states(&plan);
        let mut counter_bytes = 0;
        let steps = plan.steps().iter().enumerate().filter_map(|(at, step)| match *step {
            Step::Run { node, scratch, scratch_bytes } => {
                let beside = Beside::of(&plan, node)?;
                let places = of_step(&plan, &states, at, node, beside.nodes(), (scratch, scratch_bytes));
                let launch = launches[node.index()].take().unwrap_or_else(|| unreachable!("a node is run once"));
                let functions = std::mem::take(&mut functions[node.index()]);
                let actions = bound(launch.actions, functions, &places);
                let number = at as i32 + 1;
                let before = beside.before.filter(|_| launch.before == Joint::Stored);
                let own = [launch.behind, launch.combined].iter().all(|joint| *joint != Joint::Unstored);
                let twin = beside.twin.filter(|_| launch.twin != Joint::Unstored);
                let combined = beside.combined.filter(|_| launch.behind_combined != Joint::Unstored);
                let chosen = [beside.route, beside.assigned];
                let nodes = [before, own.then_some(node), beside.behind, twin, beside.behind_twin, combined];
                let stored = chosen.into_iter().chain(nodes).chain([beside.behind_combined]).flatten().collect();
                let (rejects, counters) = (launch.rejects, counter_bytes);
                counter_bytes += 4 * launch.counters;
                let launched =
                    Launched { node, joined: vec![], stored, beside, number, places, rejects, counters, actions };
                Some(Work::Launch(Box::new(launched)))
            }
            Step::Copy { state, new } => Some(Work::Copy {
                from: place(&plan, &states, new),
                to: place(&plan, &states, state),
                bytes: plan.graph().ty(state).bytes(),
            }),
        });
        let mut work: Vec<Work> = steps.collect();
        if !checks {
            // With checks each step is looked at by itself.
            work = joined(work);
        }
        let mut table_bytes = 0;
        for work in &mut work {
            let Work::Launch(step) = work else { continue };
            for action in &mut step.actions {
                if let Bound::Tasks { table, .. } = action {
                    table_bytes = table.place(table_bytes);
                }
            }
        }
        let program = Program { device, plan, work, states, checks, table_bytes, counter_bytes, _modules: modules };
        Ok(CudaExecutable(Arc::new(program)))
    }
}

/// The actions of a step with their loaded kernels, one for each action that has one.
fn bound(actions: Vec<Action>, functions: Vec<Function>, places: &StepPlaces) -> Vec<Bound> {
    let mut functions = functions.into_iter();
    let mut next = || functions.next().unwrap_or_else(|| unreachable!("a function for each kernel"));
    let bound = actions.into_iter().map(|action| match action {
        Action::Clear { at, bytes } => Bound::Clear { at, bytes },
        Action::Kernel(k) => Bound::Kernel {
            function: next(),
            grid: k.grid.map(|n| n as u32),
            threads: k.threads,
            shared: k.shared as u32,
            args: k.args,
        },
        Action::Tasks(t) => {
            let table = Table::new(&t.tasks, places);
            Bound::Tasks { function: next(), threads: t.threads, table }
        }
    });
    bound.collect()
}

impl Executable for CudaExecutable {
    fn plan(&self) -> &Plan {
        &self.0.plan
    }

    fn instantiate(&self) -> Result<Box<dyn Instance>> {
        let (device, plan) = (&self.0.device, &self.0.plan);
        let graph = plan.graph();
        let arena = Memory::zeroed(device, plan.arena_bytes(), || "the arena of a plan".into())?;
        {
            let _held = device.hold();
            for node in graph.nodes() {
                if let (Op::Constant(constant), Storage::Arena(at)) = (&node.op, plan.storage(node.results[0])) {
                    device.upload(arena.start() + at as u64, &constant.tensor().to_bytes())?;
                }
            }
        }
        let kept = graph
            .outputs()
            .iter()
            .filter(|(_, v)| matches!(plan.storage(*v), Storage::State(_)))
            .map(|(name, v)| Ok((*v, Memory::zeroed(device, graph.ty(*v).bytes(), || format!("output {name:?}"))?)))
            .collect::<Result<_>>()?;
        let fault = Memory::zeroed(device, 8, || "the record of rejected values".into())?;
        let tables = Memory::zeroed(device, self.0.table_bytes, || "the tables of tasks".into())?;
        let counters = Memory::zeroed(device, self.0.counter_bytes, || "the counters of launches".into())?;
        Ok(Box::new(CudaInstance::new(Arc::clone(&self.0), arena, kept, [fault, tables, counters])?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_the_bytes_and_zeros() {
        assert_eq!(words(&[1, 2]), [0x0201]);
        assert_eq!(words(&[0xff; 17]), [u128::MAX, 0xff]);
        assert!(words(&[]).is_empty());
    }
}
