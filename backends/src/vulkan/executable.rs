//! A compiled plan: every step with its kernels made, and how they are recorded.

use std::sync::Arc;

use ash::vk;
use moebius_ir::{NodeId, Op, Plan, Step, Storage, Value};

use super::device::Device;
use super::hazards::{self, Hazards, Use, writes};
use super::instance::VulkanInstance;
use super::launch::{Action, At, Launch, Number};
use super::memory::{Memory, Region};
use super::pipelines::Pipeline;
use crate::joined::Beside;
use crate::lowering::Rejects;
use crate::places::{Place, StepPlaces, of_step, place, states};
use crate::{Executable, Instance, Result};

/// An [`Action`] with its kernel made.
pub(super) enum Bound {
    Kernel { pipeline: Pipeline, buffers: Vec<At>, numbers: Vec<u8>, groups: [u32; 3] },
    Clear { at: At, bytes: usize },
}

/// A step that runs a node.
pub(super) struct Launched {
    pub(super) node: NodeId,
    /// The node, and those whose work it does too, as far as their results are in memory afterwards: in their order.
    pub(super) stored: Vec<NodeId>,
    /// Number of the step, from 1: what kernels note a rejection under.
    pub(super) number: u32,
    pub(super) places: StepPlaces,
    pub(super) rejects: Option<Rejects>,
    pub(super) actions: Vec<Bound>,
    /// Bytes of its operands and of its results.
    bytes: [Vec<usize>; 2],
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
}

/// Where an instance's memory is.
#[derive(Clone, Copy)]
pub(super) struct Addresses<'a> {
    pub(super) arena: Region,
    pub(super) states: &'a [Region],
    pub(super) fault: Region,
    pub(super) arrivals: Region,
}

impl Addresses<'_> {
    pub(super) fn of(&self, place: Place) -> Region {
        match place {
            Place::Arena(offset) => self.arena.after(offset),
            Place::State(i) => self.states[i],
        }
    }

    /// Where a buffer of a step is, and its bytes: whole words, as memory has.
    pub(super) fn buffer(&self, step: &Launched, at: At) -> (Region, usize) {
        let (region, bytes) = match at {
            At::Operand(i) => (self.of(step.places.operands[i]), step.bytes[0][i]),
            At::Result(i) => (self.of(step.places.results[i]), step.bytes[1][i]),
            At::Scratch { at, bytes } => (self.arena.after(step.places.scratch.0 + at), bytes),
            At::Fault => (self.fault, 8),
            At::Arrivals => (self.arrivals, 4),
            At::Null => unreachable!("what is nowhere is not bound"),
        };
        (region, bytes.max(4).next_multiple_of(4))
    }

    fn used(&self, step: &Launched, at: At) -> Use {
        let (region, bytes) = self.buffer(step, at);
        region.used(bytes, writes(at))
    }
}

impl Program {
    /// How many kernels there are, and how many buffers they have together.
    pub(super) fn kernels(&self) -> (usize, usize) {
        let mut count = (0, 0);
        for bound in self.launches().flat_map(|l| &l.actions) {
            if let Bound::Kernel { buffers, .. } = bound {
                count = (count.0 + 1, count.1 + buffers.len());
            }
        }
        count
    }

    /// The steps that run a node.
    pub(super) fn launches(&self) -> impl Iterator<Item = &Launched> {
        self.work.iter().filter_map(|work| if let Work::Launch(launched) = work { Some(&**launched) } else { None })
    }

    /// Records the kernels of a step, whose buffers are `sets`, each behind those before it that it must wait for.
    pub(super) fn record(
        &self,
        commands: vk::CommandBuffer,
        step: &Launched,
        addresses: Addresses<'_>,
        sets: &mut dyn Iterator<Item = vk::DescriptorSet>,
        hazards: &mut Hazards,
    ) {
        let device = &self.device.handle;
        for action in &step.actions {
            let uses: Vec<Use> = match action {
                Bound::Clear { at, .. } => vec![addresses.used(step, *at)],
                Bound::Kernel { buffers, .. } => buffers.iter().map(|&at| addresses.used(step, at)).collect(),
            };
            if let Some(barrier) = hazards.wait(&uses, matches!(action, Bound::Clear { .. })) {
                self.device.barrier(commands, barrier);
            }
            match action {
                Bound::Clear { at, bytes } => {
                    self.device.fill(commands, addresses.buffer(step, *at).0, 0, *bytes);
                }
                Bound::Kernel { pipeline, numbers, groups, .. } => {
                    let set = sets.next().unwrap_or_else(|| unreachable!("a set for each kernel"));
                    let (point, [x, y, z]) = (vk::PipelineBindPoint::COMPUTE, *groups);
                    // SAFETY: commands that are being recorded; the kernels live as long as the device, the sets as long as
                    // the instance, whose memory they name.
                    unsafe {
                        device.cmd_bind_pipeline(commands, point, pipeline.handle);
                        device.cmd_bind_descriptor_sets(commands, point, pipeline.layout, 0, &[set], &[]);
                        let stages = vk::ShaderStageFlags::COMPUTE;
                        device.cmd_push_constants(commands, pipeline.layout, stages, 0, numbers);
                        device.cmd_dispatch(commands, x, y, z);
                    }
                }
            }
        }
    }
}

pub(super) struct VulkanExecutable(pub(super) Arc<Program>);

impl VulkanExecutable {
    /// Makes the kernels of every launch of `plan`, one launch for each node of the graph.
    pub(super) fn new(
        device: Arc<Device>,
        plan: Plan,
        launches: Vec<Launch>,
        checks: bool,
    ) -> Result<VulkanExecutable> {
        let sources: Vec<_> = launches
            .iter()
            .flat_map(|l| &l.actions)
            .filter_map(|a| if let Action::Kernel(k) = a { Some(&k.source) } else { None })
            .collect();
        let mut pipelines = device.pipelines(&sources)?.into_iter();
        // With checks on, what a step may not rely on is known for the plan's own order.
        let order = if checks { (0..plan.steps().len()).collect() } else { hazards::order(&plan, &launches) };
        // The kernels in the order of the launches, the launches by node.
        type Made = (Vec<(Action, Option<Pipeline>)>, Option<Rejects>, [bool; 3]);
        let mut made: Vec<Option<Made>> = Vec::with_capacity(launches.len());
        for launch in launches {
            let with_pipeline = |action| match action {
                Action::Kernel(_) => (action, pipelines.next()),
                Action::Clear { .. } => (action, None),
            };
            let actions = launch.actions.into_iter().map(with_pipeline).collect();
            let stored = [launch.lead == Some(true), launch.stored, launch.combined == Some(true)];
            made.push(Some((actions, launch.rejects, stored)));
        }
        let states = states(&plan);
        let work = (order.into_iter().map(|at| (at, &plan.steps()[at])))
            .filter_map(|(at, step)| match *step {
                Step::Run { node, scratch, scratch_bytes } => {
                    let beside = Beside::of(&plan, node)?;
                    let places = of_step(&plan, &states, at, node, beside.nodes(), (scratch, scratch_bytes));
                    let taken = made[node.index()].take();
                    let (actions, rejects, [lead, own, combined]) =
                        taken.unwrap_or_else(|| unreachable!("a node is run once"));
                    let number = at as u32 + 1;
                    let actions =
                        actions.into_iter().map(|(action, pipeline)| bound(action, pipeline, number)).collect();
                    let bytes = bytes_of(&plan, node, beside);
                    let [lead, own] = [beside.before.filter(|_| lead), Some(node).filter(|_| own)];
                    let combined = beside.combined.filter(|_| combined);
                    let Beside { behind, route, assigned, behind_combined, .. } = beside;
                    let stored = [lead, route, own, behind, assigned, combined, behind_combined];
                    let stored = stored.into_iter().flatten().collect();
                    let launched = Launched { node, stored, number, places, rejects, actions, bytes };
                    Some(Work::Launch(Box::new(launched)))
                }
                Step::Copy { state, new } => Some(Work::Copy {
                    from: place(&plan, &states, new),
                    to: place(&plan, &states, state),
                    bytes: plan.graph().ty(state).bytes(),
                }),
            })
            .collect();
        Ok(VulkanExecutable(Arc::new(Program { device, plan, work, states, checks })))
    }
}

/// The bytes of the operands and of the results of a step's node, each followed by those of the nodes beside it.
pub(super) fn bytes_of(plan: &Plan, node: NodeId, beside: Beside) -> [Vec<usize>; 2] {
    let graph = plan.graph();
    let nodes = || [node].into_iter().chain(beside.nodes()).map(|id| graph.node(id));
    let bytes = |v: &Value| graph.ty(*v).bytes();
    [nodes().flat_map(|n| &n.operands).map(bytes).collect(), nodes().flat_map(|n| &n.results).map(bytes).collect()]
}

fn bound(action: Action, pipeline: Option<Pipeline>, step: u32) -> Bound {
    match action {
        Action::Clear { at, bytes } => Bound::Clear { at, bytes },
        Action::Kernel(kernel) => {
            let word = |number: &Number| match *number {
                Number::Word(word) => word.to_le_bytes(),
                Number::Step => step.to_le_bytes(),
            };
            Bound::Kernel {
                pipeline: pipeline.unwrap_or_else(|| unreachable!("a kernel was made for each")),
                buffers: kernel.buffers,
                // Something must be pushed, even where a kernel reads nothing.
                numbers: kernel
                    .numbers
                    .iter()
                    .chain(kernel.numbers.is_empty().then_some(&Number::Word(0)))
                    .flat_map(word)
                    .collect(),
                groups: kernel.groups.map(|n| n as u32),
            }
        }
    }
}

impl Executable for VulkanExecutable {
    fn plan(&self) -> &Plan {
        &self.0.plan
    }

    fn instantiate(&self) -> Result<Box<dyn Instance>> {
        let (device, plan) = (&self.0.device, &self.0.plan);
        let graph = plan.graph();
        let arena = Memory::zeroed(device, plan.arena_bytes(), || "the arena of a plan".into())?;
        for node in graph.nodes() {
            if let (Op::Constant(constant), Storage::Arena(at)) = (&node.op, plan.storage(node.results[0])) {
                device.upload(&mut device.hold(), arena.region().after(at), &constant.tensor().to_bytes())?;
            }
        }
        let kept = graph
            .outputs()
            .iter()
            .filter(|(_, v)| matches!(plan.storage(*v), Storage::State(_)))
            .map(|(name, v)| Ok((*v, Memory::zeroed(device, graph.ty(*v).bytes(), || format!("output {name:?}"))?)))
            .collect::<Result<_>>()?;
        let fault = Memory::zeroed(device, 8, || "the record of rejected values".into())?;
        let arrivals = Memory::zeroed(device, 4, || "the count of workgroups that are done".into())?;
        Ok(Box::new(VulkanInstance::new(Arc::clone(&self.0), arena, kept, [fault, arrivals])?))
    }
}
