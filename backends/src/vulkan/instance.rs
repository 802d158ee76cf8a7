//! Carries out a plan on a device: the whole plan is one sequence of commands, recorded once and submitted for each run.

use std::collections::BTreeMap;
use std::sync::Arc;

use ash::vk;
use moebius_ir::{NodeId, Storage, Value};

use super::BACKEND;
use super::commands::{Commands, Sets};
use super::device::{Device, Queue};
use super::error::failed;
use super::executable::{Addresses, Launched, Program, Work};
use super::hazards::{Barrier, Hazards};
use super::memory::{HostMemory, Memory, Region, VulkanStore};
use crate::finite::non_finite;
use crate::places::{POISON, output_named, place};
use crate::stored::check_bytes;
use crate::{Error, Instance, NonFinite, Result, Store};

/// Memory of the host that the device copies a feed from, the commands that do it, and the number of the last such copy.
struct Staging {
    memory: HostMemory,
    commands: vk::CommandBuffer,
    copied: u64,
}

/// Bytes of the note about a value that a kernel rejected: the step's number and the value.
const RECORD: usize = 8;

/// Stagings of a feed that are used in turn: the host writes into one while the copy out of another waits behind a run.
const STAGINGS: usize = 2;

/// How many runs are one sequence of commands where as many are asked for, and the most kernels of more than one: the device need not be told
/// of each run, and what is recorded stays small.
const RUNS: [usize; 3] = [64, 8, 1];
const MOST_KERNELS: usize = 1024;

/// A feed on its way to the device.
struct FeedStaging {
    stagings: Vec<Staging>,
    next: usize,
    /// The staging that holds what was written since the last run, which goes to the device with the next one.
    written: Option<usize>,
}

impl FeedStaging {
    /// The staging to write into; what was written since the last run is overwritten.
    fn for_writing(&mut self, device: &Device) -> Result<&mut Staging> {
        let at = match self.written {
            Some(at) => at,
            None => {
                // The last copy out of this memory must be over.
                device.wait(self.stagings[self.next].copied)?;
                self.next
            }
        };
        (self.written, self.next) = (Some(at), (at + 1) % STAGINGS);
        Ok(&mut self.stagings[at])
    }
}

pub(super) struct VulkanInstance {
    // Fields are dropped in this order: what uses memory before the memory.
    sets: Option<Sets>,
    /// Owns all command buffers.
    _commands: Commands,
    /// The plan as often as [`RUNS`] says, and whether that is recorded with the present addresses.
    runs: [(vk::CommandBuffer, bool); RUNS.len()],
    staging: BTreeMap<String, FeedStaging>,
    program: Arc<Program>,
    arena: Memory,
    /// Copies of the outputs that lie in stored tensors: those may change, move or go before they are read.
    kept: Vec<(Value, Memory)>,
    /// What kernels reject: the step's number and the value.
    fault: Memory,
    /// What a kernel counts its workgroups in.
    arrivals: Memory,
    /// Where the stored tensors lie, as of store version `located`.
    states: Vec<Region>,
    located: u64,
}

impl VulkanInstance {
    pub(super) fn new(
        program: Arc<Program>,
        arena: Memory,
        kept: Vec<(Value, Memory)>,
        [fault, arrivals]: [Memory; 2],
    ) -> Result<VulkanInstance> {
        let device = &program.device;
        let commands = Commands::new(device)?;
        let mut staging = BTreeMap::new();
        let graph = program.plan.graph();
        for (name, value) in graph.inputs() {
            if let Storage::Arena(at) = program.plan.storage(*value) {
                let bytes = graph.ty(*value).bytes();
                let to = arena.region().after(at);
                let one = || -> Result<Staging> {
                    let memory = HostMemory::new(device, bytes, || format!("feed {name:?}"))?;
                    let copy = commands.take(|| format!("copy of feed {name:?}"))?;
                    let from = memory.region();
                    let again = vk::CommandBufferUsageFlags::empty();
                    device.record(copy, again, |commands| device.copy(commands, from, to, bytes))?;
                    Ok(Staging { memory, commands: copy, copied: 0 })
                };
                let stagings = (0..STAGINGS).map(|_| one()).collect::<Result<_>>()?;
                staging.insert(name.clone(), FeedStaging { stagings, next: 0, written: None });
            }
        }
        let states = vec![arena.region(); program.states.len()];
        let mut runs = [(vk::CommandBuffer::null(), false); RUNS.len()];
        for ((taken, _), times) in runs.iter_mut().zip(RUNS) {
            *taken = commands.take(|| format!("a whole plan, {times} times"))?;
        }
        Ok(VulkanInstance {
            sets: None,
            _commands: commands,
            runs,
            staging,
            program,
            arena,
            kept,
            fault,
            arrivals,
            states,
            located: 0,
        })
    }

    fn addresses(&self) -> Addresses<'_> {
        let [fault, arrivals] = [self.fault.region(), self.arrivals.region()];
        Addresses { arena: self.arena.region(), states: &self.states, fault, arrivals }
    }

    /// Looks up the stored tensors, if they may have moved, and tells the kernels.
    fn locate(&mut self, store: &mut dyn Store) -> Result<()> {
        let foreign = || Error::ForeignStore { backend: BACKEND };
        let store = store.as_any_mut().downcast_mut::<VulkanStore>().ok_or_else(foreign)?;
        if !store.is_on(&self.program.device) {
            return Err(foreign());
        }
        let tensors = store.tensors();
        if self.located == tensors.version() && self.sets.is_some() {
            return Ok(());
        }
        // What was recorded before may still run.
        self.program.device.wait_all()?;
        self.sets = None;
        self.runs.iter_mut().for_each(|(_, recorded)| *recorded = false);
        let located = tensors.located(self.program.plan.graph(), &self.program.states);
        for (slot, memory) in self.states.iter_mut().zip(located) {
            *slot = memory?.region();
        }
        self.sets = Some(Sets::new(&self.program, self.addresses())?);
        self.located = tensors.version();
        Ok(())
    }

    fn sets(&self) -> impl Iterator<Item = vk::DescriptorSet> + use<'_> {
        self.sets.iter().flat_map(|sets| sets.sets.iter().copied())
    }

    /// Records a copy, behind what it must wait for.
    fn copy(&self, commands: vk::CommandBuffer, [from, to]: [Region; 2], bytes: usize, hazards: &mut Hazards) {
        if let Some(barrier) = hazards.wait(&[from.used(bytes, false), to.used(bytes, true)], true) {
            self.program.device.barrier(commands, barrier);
        }
        self.program.device.copy(commands, from, to, bytes);
    }

    /// Records what keeps outputs that lie in stored tensors.
    fn keep(&self, commands: vk::CommandBuffer, hazards: &mut Hazards) {
        for (value, memory) in &self.kept {
            self.copy(commands, [self.region(*value), memory.region()], memory.len(), hazards);
        }
    }

    /// Records the whole plan. `after` is called behind each launch; if it says so, what follows waits for that.
    fn record_all(&self, commands: vk::CommandBuffer, mut after: impl FnMut(&Launched) -> bool) {
        let (program, addresses) = (&*self.program, self.addresses());
        let (mut sets, mut hazards) = (self.sets(), Hazards::default());
        for work in &program.work {
            match work {
                Work::Launch(step) => {
                    program.record(commands, step, addresses, &mut sets, &mut hazards);
                    if after(step) {
                        program.device.barrier(commands, Barrier::All);
                        hazards = Hazards::default();
                    }
                }
                Work::Copy { from, to, bytes } => {
                    self.copy(commands, [addresses.of(*from), addresses.of(*to)], *bytes, &mut hazards);
                }
            }
        }
        self.keep(commands, &mut hazards);
    }

    /// Records so many runs of the plan, one after another.
    fn record_runs(&self, commands: vk::CommandBuffer, runs: usize) -> Result<()> {
        let device = &self.program.device;
        let again = vk::CommandBufferUsageFlags::SIMULTANEOUS_USE;
        device.record(commands, again, |commands| {
            for run in 0..runs {
                if run > 0 {
                    device.barrier(commands, Barrier::All);
                }
                self.record_all(commands, |_| false);
            }
        })?;
        Ok(())
    }

    /// Runs every step once, one by one, waiting for each; with checks on, what a step may not rely on is filled with NaN before it,
    /// and the fences are looked at after it. `after` sees each launch and may end the run early.
    fn run_steps(&self, queue: &mut Queue, mut after: impl FnMut(&mut Queue, &Launched) -> Result<bool>) -> Result<()> {
        let (program, addresses) = (&*self.program, self.addresses());
        let device = &program.device;
        let mut sets = self.sets();
        for work in &program.work {
            match work {
                Work::Launch(step) => {
                    device.now(queue, |commands| {
                        if program.checks {
                            let poison = |at, bytes| device.fill(commands, addresses.arena.after(at), POISON, bytes);
                            step.places.fresh.iter().for_each(|&(at, bytes)| poison(at, bytes));
                            step.places.fences.iter().for_each(|&(from, to)| poison(from, to - from));
                            device.barrier(commands, Barrier::All);
                        }
                        program.record(commands, step, addresses, &mut sets, &mut Hazards::default());
                    })?;
                    if program.checks {
                        self.watch(queue, step)?;
                    }
                    if !after(queue, step)? {
                        return Ok(());
                    }
                }
                Work::Copy { from, to, bytes } => {
                    device.now(queue, |c| device.copy(c, addresses.of(*from), addresses.of(*to), *bytes))?;
                }
            }
        }
        Ok(device.now(queue, |commands| self.keep(commands, &mut Hazards::default()))?)
    }

    /// An error if a step wrote into a fence.
    fn watch(&self, queue: &mut Queue, step: &Launched) -> Result<()> {
        for &(from, to) in &step.places.fences {
            let mut fence = vec![0; to - from];
            self.program.device.download(queue, [(self.arena.region().after(from), &mut fence[..])])?;
            if fence.iter().any(|&b| b != POISON) {
                let node = self.program.plan.graph().node(step.node);
                return Err(Error::Fence { op: node.op.name(), site: node.site.clone() });
            }
        }
        Ok(())
    }

    /// Where a value lies.
    fn region(&self, value: Value) -> Region {
        self.addresses().of(place(&self.program.plan, &self.program.states, value))
    }

    /// Submits the copies of all feeds that were written since the last run, with `then` behind them.
    fn bring_feeds(&mut self, queue: &mut Queue, then: Option<vk::CommandBuffer>) -> Result<()> {
        let mut commands = Vec::with_capacity(self.staging.len() + 1);
        commands.extend(self.staging.values().filter_map(|feed| Some(feed.stagings[feed.written?].commands)));
        commands.extend(then);
        let number = self.program.device.submit(queue, &commands)?;
        for feed in self.staging.values_mut() {
            if let Some(at) = feed.written.take() {
                feed.stagings[at].copied = number;
            }
        }
        Ok(())
    }

    /// The error of the first value that a kernel rejected since this was last asked, if there is one, as it was noted.
    fn rejected(&self, queue: &mut Queue, record: [u8; RECORD]) -> Result<()> {
        let (device, at) = (&self.program.device, self.fault.region());
        let [step, found] = [&record[..4], &record[4..]].map(|b| i32::from_le_bytes(b.try_into().unwrap_or_default()));
        if step == 0 {
            return Ok(());
        }
        device.now(queue, |commands| device.fill(commands, at, 0, record.len()))?;
        let launched = self.program.launches().find(|l| l.number as i32 == step);
        let Some((launched, rejects)) = launched.and_then(|l| Some((l, l.rejects.as_ref()?))) else { return Ok(()) };
        Err(rejects.error(self.program.plan.graph().node(launched.node), found))
    }
}

impl Instance for VulkanInstance {
    fn write(&mut self, feed: &str, bytes: &[u8]) -> Result<()> {
        let program = Arc::clone(&self.program);
        let graph = program.plan.graph();
        let (Some(value), Some(staging)) = (graph.input_named(feed), self.staging.get_mut(feed)) else {
            let there = self.staging.keys().cloned().collect();
            return Err(Error::NoSuch { what: "feed", name: feed.into(), there });
        };
        check_bytes("feed", feed, graph.ty(value), bytes.len())?;
        let staging = staging.for_writing(&program.device)?;
        staging.memory.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn run(&mut self, store: &mut dyn Store) -> Result<()> {
        self.run_times(store, 1)
    }

    fn run_times(&mut self, store: &mut dyn Store, times: usize) -> Result<()> {
        let program = Arc::clone(&self.program);
        let device = &program.device;
        let mut queue = device.hold();
        self.locate(store)?;
        if program.checks {
            self.bring_feeds(&mut queue, None)?;
            (0..times).try_for_each(|_| self.run_steps(&mut queue, |_, _| Ok(true)))?;
        } else {
            let mut left = times;
            for (at, runs) in RUNS.into_iter().enumerate() {
                if left < runs || runs > 1 && runs * program.kernels().0 > MOST_KERNELS {
                    continue;
                }
                while left >= runs {
                    let (commands, recorded) = self.runs[at];
                    if !recorded {
                        self.record_runs(commands, runs)?;
                        self.runs[at].1 = true;
                    }
                    self.bring_feeds(&mut queue, Some(commands))?;
                    left -= runs;
                }
            }
        }
        Ok(device.validated()?)
    }

    fn read(&self, output: &str, out: &mut [u8]) -> Result<()> {
        let graph = self.program.plan.graph();
        let value = output_named(graph, output)?;
        check_bytes("output", output, graph.ty(value), out.len())?;
        let device = &self.program.device;
        let mut queue = device.hold();
        let from = match self.kept.iter().find(|(v, _)| *v == value) {
            Some((_, copy)) => copy.region(),
            None => self.region(value),
        };
        let mut record = [0; RECORD];
        device.download(&mut queue, [(from, out), (self.fault.region(), &mut record)])?;
        self.rejected(&mut queue, record)
    }

    fn first_non_finite(&mut self, store: &mut dyn Store) -> Result<Option<NonFinite>> {
        let program = Arc::clone(&self.program);
        let mut queue = program.device.hold();
        self.locate(store)?;
        self.bring_feeds(&mut queue, None)?;
        let mut found = None;
        let graph = program.plan.graph();
        self.run_steps(&mut queue, |queue, step| {
            let nodes = step.stored.iter().map(|&id| graph.node(id));
            for (node, &value) in nodes.flat_map(|node| node.results.iter().map(move |value| (node, value))) {
                let mut bytes = vec![0; graph.ty(value).bytes()];
                program.device.download(queue, [(self.region(value), &mut bytes[..])])?;
                if let Some(element) = non_finite(graph.ty(value).dtype, &bytes) {
                    found = Some(NonFinite::of(graph, node, value, element));
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        let mut record = [0; RECORD];
        program.device.download(&mut queue, [(self.fault.region(), &mut record[..])])?;
        self.rejected(&mut queue, record)?;
        Ok(found)
    }

    fn profile(&mut self, store: &mut dyn Store) -> Result<Vec<(NodeId, f64)>> {
        let program = Arc::clone(&self.program);
        let device = &program.device;
        let mut queue = device.hold();
        self.locate(store)?;
        self.bring_feeds(&mut queue, None)?;
        let nodes: Vec<NodeId> = program.launches().map(|l| l.node).collect();
        let Some(tick) = device.clock else {
            // By the host's clock, which counts the waiting for each step too.
            let (mut seconds, mut last) = (Vec::with_capacity(nodes.len()), std::time::Instant::now());
            self.run_steps(&mut queue, |_, _| {
                seconds.push(last.elapsed().as_secs_f64());
                last = std::time::Instant::now();
                Ok(true)
            })?;
            return Ok(nodes.into_iter().zip(seconds).collect());
        };
        let info =
            vk::QueryPoolCreateInfo::default().query_type(vk::QueryType::TIMESTAMP).query_count(nodes.len() as u32 + 1);
        // SAFETY: a live device, here and below.
        let pool = unsafe { device.handle.create_query_pool(&info, None) }.map_err(failed("vkCreateQueryPool"))?;
        device.name_object(pool, || "times of steps".into());
        let mut times = vec![0u64; nodes.len() + 1];
        let measured = device.now(&mut queue, |commands| {
            let mut at = 0;
            let mut stamp = || {
                // SAFETY: commands that are being recorded, and a query of the pool that was just reset.
                unsafe {
                    let stage = vk::PipelineStageFlags::BOTTOM_OF_PIPE;
                    device.handle.cmd_write_timestamp(commands, stage, pool, at);
                }
                at += 1;
            };
            // SAFETY: as above.
            unsafe { device.handle.cmd_reset_query_pool(commands, pool, 0, nodes.len() as u32 + 1) };
            stamp();
            // A step is timed from the end of the one before.
            self.record_all(commands, |_| {
                stamp();
                true
            });
        });
        let flags = vk::QueryResultFlags::TYPE_64 | vk::QueryResultFlags::WAIT;
        let read = measured.and_then(|()| {
            // SAFETY: every query was written, as the commands are done.
            unsafe { device.handle.get_query_pool_results(pool, 0, &mut times, flags) }
                .map_err(failed("vkGetQueryPoolResults"))
        });
        // SAFETY: made above, and nothing runs that uses it.
        unsafe { device.handle.destroy_query_pool(pool, None) };
        read?;
        let seconds = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0]) as f64 * tick);
        Ok(nodes.into_iter().zip(seconds).collect())
    }
}
