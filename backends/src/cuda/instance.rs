//! Carries out a plan on a GPU. The first run puts every kernel on the stream one by one; from the second run on, the whole plan
//! is one graph of the driver, recorded once and replayed.

use std::collections::BTreeMap;
use std::sync::Arc;

use cust::event::{Event, EventFlags, EventStatus};
use cust::memory::LockedBuffer;
use moebius_ir::{NodeId, Storage, Value};

use super::driver::{Counter, failed};
use super::error::CudaError;
use super::executable::{Addresses, Launched, Program, Work};
use super::memory::{CudaStore, Memory};
use super::{BACKEND, recording::Recording};
use crate::finite::non_finite;
use crate::places::{POISON, output_named, place};
use crate::stored::check_bytes;
use crate::{Error, Instance, NonFinite, Result, Store};

/// Memory of the host that the GPU copies a feed from, and the event after the last such copy.
struct Staging {
    buffer: LockedBuffer<u8>,
    copied: Event,
}

/// Stagings of a feed that are used in turn: the host writes into one while the copy out of another waits behind a run.
const STAGINGS: usize = 2;

/// A feed on its way to the GPU.
struct FeedStaging {
    stagings: [Staging; STAGINGS],
    next: usize,
}

impl Staging {
    fn new(bytes: usize) -> Result<Staging, CudaError> {
        let buffer = LockedBuffer::new(&0, bytes).map_err(failed("cuMemAllocHost"))?;
        let copied = Event::new(EventFlags::DISABLE_TIMING).map_err(failed("cuEventCreate"))?;
        Ok(Staging { buffer, copied })
    }
}

pub(super) struct CudaInstance {
    program: Arc<Program>,
    recording: Option<Recording>,
    /// Whether the plan has run with the present addresses, so that it may be recorded.
    tried: bool,
    arena: Memory,
    /// Copies of the outputs that lie in stored tensors: those may change, move or go before they are read.
    kept: Vec<(Value, Memory)>,
    /// What kernels reject: the step's number and the value.
    fault: Memory,
    /// Tables of tasks, as of store version `located`.
    tables: Memory,
    /// What blocks of a launch count, 0 between runs.
    counters: Memory,
    staging: BTreeMap<String, FeedStaging>,
    /// Where the stored tensors lie, as of store version `located`.
    states: Vec<u64>,
    located: Option<u64>,
}

impl CudaInstance {
    pub(super) fn new(
        program: Arc<Program>,
        arena: Memory,
        kept: Vec<(Value, Memory)>,
        [fault, tables, counters]: [Memory; 3],
    ) -> Result<CudaInstance> {
        let mut staging = BTreeMap::new();
        let graph = program.plan.graph();
        for (name, value) in graph.inputs() {
            if let Storage::Arena(_) = program.plan.storage(*value) {
                let bytes = graph.ty(*value).bytes().max(1);
                let stagings = [Staging::new(bytes)?, Staging::new(bytes)?];
                staging.insert(name.clone(), FeedStaging { stagings, next: 0 });
            }
        }
        let states = vec![0; program.states.len()];
        let (recording, tried, located) = (None, false, None);
        Ok(CudaInstance { program, recording, tried, arena, kept, fault, tables, counters, staging, states, located })
    }

    fn addresses(&self) -> Addresses<'_> {
        let memories = [&self.arena, &self.fault, &self.tables, &self.counters];
        let [arena, fault, tables, counters] = memories.map(Memory::start);
        Addresses { arena, states: &self.states, fault, tables, counters }
    }

    /// Looks up the stored tensors, if they may have moved.
    fn locate(&mut self, store: &mut dyn Store) -> Result<()> {
        let foreign = || Error::ForeignStore { backend: BACKEND };
        let store = store.as_any_mut().downcast_mut::<CudaStore>().ok_or_else(foreign)?;
        if !store.is_on(&self.program.device) {
            return Err(foreign());
        }
        let tensors = store.tensors();
        if self.located == Some(tensors.version()) {
            return Ok(());
        }
        let located = tensors.located(self.program.plan.graph(), &self.program.states);
        for (slot, memory) in self.states.iter_mut().zip(located) {
            *slot = memory?.start();
        }
        let tables = self.program.tables(self.addresses());
        if !tables.is_empty() {
            self.program.device.upload(self.tables.start(), &tables)?;
        }
        self.located = Some(tensors.version());
        // A recording holds addresses.
        (self.recording, self.tried) = (None, false);
        Ok(())
    }

    /// Puts every step on the stream; `before` and `after` see each launch, and `after` may end the run early.
    fn steps(
        &self,
        mut before: impl FnMut(&Launched) -> Result<()>,
        mut after: impl FnMut(&Launched) -> Result<bool>,
    ) -> Result<()> {
        let (program, addresses) = (&*self.program, self.addresses());
        let mut begun = false;
        for work in &program.work {
            match work {
                Work::Launch(step) => {
                    before(step)?;
                    program.enqueue(step, addresses, &mut begun)?;
                    if !after(step)? {
                        return Ok(());
                    }
                }
                Work::Copy { from, to, bytes } => {
                    program.device.copy(addresses.of(*from), addresses.of(*to), *bytes)?;
                }
            }
        }
        for (value, memory) in &self.kept {
            program.device.copy(self.address(*value), memory.start(), memory.len())?;
        }
        Ok(())
    }

    /// Fills what a step may not rely on with NaN, and watches the fences, waiting for each step.
    fn steps_checked(&self, mut after: impl FnMut(&Launched) -> Result<bool>) -> Result<()> {
        let (device, arena) = (&self.program.device, self.arena.start());
        let poison = |step: &Launched| -> Result<()> {
            for &(at, bytes) in &step.places.fresh {
                device.fill(arena + at as u64, POISON, bytes)?;
            }
            for &(from, to) in &step.places.fences {
                device.fill(arena + from as u64, POISON, to - from)?;
            }
            Ok(())
        };
        let watch = |step: &Launched| -> Result<bool> {
            for &(from, to) in &step.places.fences {
                let mut fence = vec![0; to - from];
                device.download(arena + from as u64, &mut fence)?;
                if fence.iter().any(|&b| b != POISON) {
                    let node = self.program.plan.graph().node(step.node);
                    return Err(Error::Fence { op: node.op.name(), site: node.site.clone() });
                }
            }
            after(step)
        };
        self.steps(poison, watch)
    }

    /// Runs every step once, one by one.
    fn run_steps(&self, after: impl FnMut(&Launched) -> Result<bool>) -> Result<()> {
        if self.program.checks { self.steps_checked(after) } else { self.steps(|_| Ok(()), after) }
    }

    /// Where a value lies.
    fn address(&self, value: Value) -> u64 {
        self.addresses().of(place(&self.program.plan, &self.program.states, value))
    }

    /// The error of the first value that a kernel rejected since this was last asked, if there is one.
    fn rejected(&self) -> Result<()> {
        let mut record = [0; 8];
        self.program.device.download(self.fault.start(), &mut record)?;
        self.rejection(record)
    }

    /// The error that a record of rejected values stands for; it is taken back.
    fn rejection(&self, record: [u8; 8]) -> Result<()> {
        let device = &self.program.device;
        let [step, found] = [&record[..4], &record[4..]].map(|b| i32::from_le_bytes(b.try_into().unwrap_or_default()));
        if step == 0 {
            return Ok(());
        }
        device.fill(self.fault.start(), 0, record.len())?;
        let launched = self.program.work.iter().find_map(|work| match work {
            Work::Launch(launched) if launched.number == step => Some(launched),
            Work::Launch(_) | Work::Copy { .. } => None,
        });
        let Some((launched, rejects)) = launched.and_then(|l| Some((l, l.rejects.as_ref()?))) else { return Ok(()) };
        Err(rejects.error(self.program.plan.graph().node(launched.node), found))
    }

    /// A value on the host, after everything on the stream.
    fn value_bytes(&self, value: Value) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.program.plan.graph().ty(value).bytes()];
        self.program.device.download(self.address(value), &mut bytes)?;
        Ok(bytes)
    }
}

impl Instance for CudaInstance {
    fn write(&mut self, feed: &str, bytes: &[u8]) -> Result<()> {
        let program = Arc::clone(&self.program);
        let graph = program.plan.graph();
        let value = graph.input_named(feed);
        let at = value.map(|v| program.plan.storage(v));
        let (Some(value), Some(Storage::Arena(at)), Some(staging)) = (value, at, self.staging.get_mut(feed)) else {
            let there = self.staging.keys().cloned().collect();
            return Err(Error::NoSuch { what: "feed", name: feed.into(), there });
        };
        check_bytes("feed", feed, graph.ty(value), bytes.len())?;
        program.device.enter()?;
        let _held = program.device.hold();
        let FeedStaging { stagings, next } = staging;
        let staging = &mut stagings[*next];
        *next = (*next + 1) % STAGINGS;
        // The last copy out of this memory must be over.
        if staging.copied.query().map_err(failed("cuEventQuery"))? == EventStatus::NotReady {
            Counter::count(&program.device.counter.copy_waits);
            staging.copied.synchronize().map_err(failed("cuEventSynchronize"))?;
        }
        staging.buffer.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        program.device.upload_later(self.arena.start() + at as u64, &staging.buffer.as_slice()[..bytes.len()])?;
        Ok(staging.copied.record(program.device.stream()).map_err(failed("cuEventRecord"))?)
    }

    fn run(&mut self, store: &mut dyn Store) -> Result<()> {
        let program = Arc::clone(&self.program);
        program.device.enter()?;
        let _held = program.device.hold();
        self.locate(store)?;
        if program.checks || !self.tried {
            // Also loads every kernel, which a recording must not be interrupted by.
            self.run_steps(|_| Ok(true))?;
            self.tried = true;
            return Ok(());
        }
        if self.recording.is_none() {
            self.recording = Some(Recording::of(&program.device, || self.run_steps(|_| Ok(true)))?);
        }
        match &self.recording {
            Some(recording) => Ok(recording.replay(&program.device)?),
            None => Ok(()),
        }
    }

    fn read(&self, output: &str, out: &mut [u8]) -> Result<()> {
        let graph = self.program.plan.graph();
        let value = output_named(graph, output)?;
        check_bytes("output", output, graph.ty(value), out.len())?;
        let device = &self.program.device;
        device.enter()?;
        let _held = device.hold();
        let from = match self.kept.iter().find(|(v, _)| *v == value) {
            Some((_, copy)) => copy.start(),
            None => self.address(value),
        };
        let mut record = [0; 8];
        device.download_all([(self.fault.start(), &mut record), (from, out)])?;
        self.rejection(record)
    }

    fn first_non_finite(&mut self, store: &mut dyn Store) -> Result<Option<NonFinite>> {
        let program = Arc::clone(&self.program);
        program.device.enter()?;
        let _held = program.device.hold();
        self.locate(store)?;
        let mut found = None;
        let graph = program.plan.graph();
        self.run_steps(|step| {
            let nodes = step.stored.iter().chain(&step.joined).map(|&id| graph.node(id));
            for (node, &value) in nodes.flat_map(|node| node.results.iter().map(move |value| (node, value))) {
                if let Some(element) = non_finite(graph.ty(value).dtype, &self.value_bytes(value)?) {
                    found = Some(NonFinite::of(graph, node, value, element));
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        self.rejected()?;
        Ok(found)
    }

    fn profile(&mut self, store: &mut dyn Store) -> Result<Vec<(NodeId, f64)>> {
        let program = Arc::clone(&self.program);
        program.device.enter()?;
        let _held = program.device.hold();
        self.locate(store)?;
        let event = || -> Result<Event> {
            let event = Event::new(EventFlags::DEFAULT).map_err(failed("cuEventCreate"))?;
            event.record(program.device.stream()).map_err(failed("cuEventRecord"))?;
            Ok(event)
        };
        let mut events = vec![event()?];
        let mut launched = Vec::with_capacity(program.work.len());
        self.run_steps(|step| {
            launched.push(([&[step.node], &step.joined[..]].concat(), step.beside));
            events.push(event()?);
            Ok(true)
        })?;
        program.device.synchronize()?;
        let seconds = |pair: &[Event]| -> Result<f64> {
            let milliseconds = pair[1].elapsed_time_f32(&pair[0]).map_err(failed("cuEventElapsedTime"))?;
            Ok(f64::from(milliseconds) / 1e3)
        };
        // Nodes that are joined share the time as they share the bytes.
        let graph = program.plan.graph();
        let bytes = |node: NodeId| graph.node(node).results.iter().map(|&v| graph.ty(v).bytes() as f64).sum::<f64>();
        let mut times = Vec::with_capacity(launched.len());
        for ((nodes, beside), pair) in launched.into_iter().zip(events.windows(2)) {
            let (seconds, all) = (seconds(pair)?, nodes.iter().map(|&n| bytes(n)).sum::<f64>().max(1.0));
            let alone = nodes.len() == 1;
            times.extend(nodes.into_iter().map(|n| (n, if alone { seconds } else { seconds * bytes(n) / all })));
            // The time of what is beside a node is that node's.
            times.extend(beside.nodes().map(|id| (id, 0.0)));
        }
        Ok(times)
    }
}
