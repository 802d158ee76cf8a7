//! Carries out a plan on the CPU.

use std::sync::Arc;
use std::time::Instant;

use moebius_ir::{DType, NodeId, Op, Plan, Step, Storage, Value};

use super::BACKEND;
use super::crew::Crew;
use super::element::Element;
use super::lower::{Args, Launch};
use super::memory::{Buffer, CpuStore, copy};
use crate::places::{POISON, Place, StepPlaces, of_step, output_named, place, states};
use crate::{Error, Executable, Instance, NonFinite, Result, Store};

struct Launched {
    node: NodeId,
    /// Whether the step before has done this one's work too.
    done: bool,
    launch: Launch,
    places: StepPlaces,
}

enum Work {
    Launch(Launched),
    Copy { from: Place, to: Place, bytes: usize },
}

struct Program {
    plan: Plan,
    work: Vec<Work>,
    /// The parameters and states, in the order of the table.
    states: Vec<Value>,
    crew: Arc<Crew>,
    checks: bool,
}

pub(crate) struct CpuExecutable(Arc<Program>);

impl CpuExecutable {
    pub(crate) fn new(plan: Plan, launches: Vec<Launch>, crew: Arc<Crew>, checks: bool) -> Self {
        let states = states(&plan);
        let mut launches: Vec<Option<Launch>> = launches.into_iter().map(Some).collect();
        let mut done_before = None;
        let work = plan
            .steps()
            .iter()
            .enumerate()
            .map(|(at, step)| match *step {
                Step::Run { node, scratch, scratch_bytes } => {
                    let places = of_step(&plan, &states, at, node, plan.joined(node), (scratch, scratch_bytes));
                    let launch = launches[node.index()].take().unwrap_or_else(|| unreachable!("a node is run once"));
                    let done = done_before == Some(node);
                    done_before = plan.joined(node);
                    Work::Launch(Launched { node, done, launch, places })
                }
                Step::Copy { state, new } => Work::Copy {
                    from: place(&plan, &states, new),
                    to: place(&plan, &states, state),
                    bytes: plan.graph().ty(state).bytes(),
                },
            })
            .collect();
        CpuExecutable(Arc::new(Program { plan, work, states, crew, checks }))
    }
}

impl Executable for CpuExecutable {
    fn plan(&self) -> &Plan {
        &self.0.plan
    }

    fn instantiate(&self) -> Result<Box<dyn Instance>> {
        let bytes = self.0.plan.arena_bytes();
        let mut arena = Buffer::zeroed(bytes, || "the arena of a plan".into())?;
        let graph = self.0.plan.graph();
        for node in graph.nodes() {
            if let (Op::Constant(constant), Storage::Arena(at)) = (&node.op, self.0.plan.storage(node.results[0])) {
                let bytes = constant.tensor().to_bytes();
                arena.bytes_mut()[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        let kept = graph
            .outputs()
            .iter()
            .filter(|(_, v)| matches!(self.0.plan.storage(*v), Storage::State(_)))
            .map(|(name, v)| Ok((*v, Buffer::zeroed(graph.ty(*v).bytes(), || format!("output {name:?}"))?)))
            .collect::<Result<_>>()?;
        Ok(Box::new(CpuInstance {
            program: Arc::clone(&self.0),
            arena,
            kept,
            states: vec![std::ptr::null_mut(); self.0.states.len()],
            located: 0,
        }))
    }
}

struct CpuInstance {
    program: Arc<Program>,
    arena: Buffer,
    /// Copies of the outputs that lie in stored tensors: those may change, move or go before they are read.
    kept: Vec<(Value, Buffer)>,
    /// Where the stored tensors lie, as of store version `located`.
    states: Vec<*mut u8>,
    located: u64,
}

// SAFETY: the pointers in `states` are used only inside `run`, which holds the store they point into exclusively.
unsafe impl Send for CpuInstance {}

impl CpuInstance {
    fn locate(&mut self, store: &mut dyn Store) -> Result<()> {
        let store = store.as_any_mut().downcast_mut::<CpuStore>().ok_or(Error::ForeignStore { backend: BACKEND })?;
        let tensors = store.tensors();
        if self.located == tensors.version() {
            return Ok(());
        }
        let located = tensors.located(self.program.plan.graph(), &self.program.states);
        for (slot, buffer) in self.states.iter_mut().zip(located) {
            *slot = buffer?.as_ptr();
        }
        self.located = tensors.version();
        Ok(())
    }

    /// Runs every step; `after` sees the instance after each launch and may end the run early.
    fn steps(&mut self, mut after: impl FnMut(&Self, &Launched) -> bool) -> Result<()> {
        let owned = Arc::clone(&self.program);
        let program = &*owned;
        let me = &*self;
        let (arena, states) = (me.arena.as_ptr(), &*me.states);
        let work = || {
            for work in &program.work {
                match work {
                    Work::Launch(l) if l.done => {
                        if !after(me, l) {
                            return Ok(());
                        }
                    }
                    Work::Launch(l) => {
                        if program.checks {
                            // SAFETY: planned ranges of the arena that hold no live value during this step.
                            l.places.fresh.iter().for_each(|&(at, n)| unsafe { arena.add(at).write_bytes(POISON, n) });
                            // SAFETY: fences belong to no value.
                            l.places.fences.iter().for_each(|&(from, to)| unsafe {
                                arena.add(from).write_bytes(POISON, to - from);
                            });
                        }
                        let args = Args::new(arena, states, &l.places.operands, &l.places.results, l.places.scratch);
                        let node = program.plan.graph().node(l.node);
                        (l.launch.run)(&args).map_err(|e| Error::Kernel {
                            op: node.op.name(),
                            site: node.site.clone(),
                            wanted: e.wanted,
                            found: e.found,
                        })?;
                        let intact = |&(from, to): &(usize, usize)| {
                            // SAFETY: inside the arena, which nothing writes between steps.
                            let fence = unsafe { std::slice::from_raw_parts(arena.add(from), to - from) };
                            fence.iter().all(|&b| b == POISON)
                        };
                        if program.checks && !l.places.fences.iter().all(intact) {
                            return Err(Error::Fence { op: node.op.name(), site: node.site.clone() });
                        }
                        if !after(me, l) {
                            return Ok(());
                        }
                    }
                    Work::Copy { from, to, bytes } => {
                        let at = |p: &Place| match *p {
                            // SAFETY: planned offsets lie inside the arena.
                            Place::Arena(offset) => unsafe { arena.add(offset) },
                            Place::State(i) => states[i],
                        };
                        // SAFETY: a planned value and a stored tensor of the same type; they never overlap.
                        unsafe { std::ptr::copy_nonoverlapping(at(from), at(to), *bytes) }
                    }
                }
            }
            Ok(())
        };
        program.crew.lead(work)
    }

    /// Copies the outputs that lie in stored tensors. Only after a run that has located those.
    fn keep(&mut self) {
        let mut kept = std::mem::take(&mut self.kept);
        for (value, buffer) in &mut kept {
            buffer.bytes_mut().copy_from_slice(self.value_bytes(*value));
        }
        self.kept = kept;
    }

    /// Only while the store of the run is held: a value may lie in it.
    fn value_bytes(&self, value: Value) -> &[u8] {
        let bytes = self.program.plan.graph().ty(value).bytes();
        match self.program.plan.storage(value) {
            Storage::Arena(at) => &self.arena.bytes()[at..at + bytes],
            Storage::State(s) => {
                let slot = self
                    .program
                    .states
                    .iter()
                    .position(|&t| t == s)
                    .unwrap_or_else(|| unreachable!("every state is listed"));
                if self.states[slot].is_null() {
                    return &[];
                }
                // SAFETY: located in the store by the run that is going on.
                unsafe { std::slice::from_raw_parts(self.states[slot], bytes) }
            }
        }
    }
}

impl Instance for CpuInstance {
    fn write(&mut self, feed: &str, bytes: &[u8]) -> Result<()> {
        let program = Arc::clone(&self.program);
        let graph = program.plan.graph();
        let value = graph.input_named(feed).filter(|&v| matches!(program.plan.storage(v), Storage::Arena(_)));
        let Some(value) = value else {
            let feeds = graph.inputs().iter().filter(|(_, v)| matches!(program.plan.storage(*v), Storage::Arena(_)));
            let there = feeds.map(|(n, _)| n.clone()).collect();
            return Err(Error::NoSuch { what: "feed", name: feed.into(), there });
        };
        let (ty, Storage::Arena(at)) = (graph.ty(value), program.plan.storage(value)) else { return Ok(()) };
        copy("feed", feed, ty, bytes, &mut self.arena.bytes_mut()[at..at + ty.bytes()])
    }

    fn run(&mut self, store: &mut dyn Store) -> Result<()> {
        self.locate(store)?;
        self.steps(|_, _| true)?;
        self.keep();
        Ok(())
    }

    fn read(&self, output: &str, out: &mut [u8]) -> Result<()> {
        let graph = self.program.plan.graph();
        let value = output_named(graph, output)?;
        let bytes = match self.kept.iter().find(|(v, _)| *v == value) {
            Some((_, copy)) => copy.bytes(),
            None => self.value_bytes(value),
        };
        copy("output", output, graph.ty(value), bytes, out)
    }

    fn first_non_finite(&mut self, store: &mut dyn Store) -> Result<Option<NonFinite>> {
        self.locate(store)?;
        let mut found = None;
        self.steps(|me, launched| {
            let graph = me.program.plan.graph();
            let node = graph.node(launched.node);
            // What a joined chain has written over is judged as the chain's, whose step is the next.
            let plan = &me.program.plan;
            let over: &[Value] = plan.joined(launched.node).map_or(&[], |chain| &graph.node(chain).results);
            let kept = |v: &&Value| !over.iter().any(|o| plan.storage(*o) == plan.storage(**v));
            for &value in node.results.iter().filter(kept) {
                if let Some(element) = non_finite(graph.ty(value).dtype, me.value_bytes(value)) {
                    found = Some(NonFinite::of(graph, node, value, element));
                    return false;
                }
            }
            true
        })?;
        Ok(found)
    }

    fn profile(&mut self, store: &mut dyn Store) -> Result<Vec<(NodeId, f64)>> {
        self.locate(store)?;
        let mut times = Vec::with_capacity(self.program.work.len());
        let mut begun = Instant::now();
        self.steps(|_, launched| {
            times.push((launched.node, begun.elapsed().as_secs_f64()));
            begun = Instant::now();
            true
        })?;
        self.keep();
        Ok(times)
    }
}

/// Index and value of the first element that is not finite.
fn non_finite(dtype: DType, bytes: &[u8]) -> Option<(usize, f32)> {
    fn scan<T: Element>(bytes: &[u8]) -> Option<(usize, f32)> {
        let elements: &[T] = bytemuck::cast_slice(bytes);
        elements.iter().map(|e| e.to_f32()).enumerate().find(|(_, v)| !v.is_finite())
    }
    match dtype {
        DType::F32 => scan::<f32>(bytes),
        DType::Bf16 => scan::<half::bf16>(bytes),
        DType::F16 => scan::<half::f16>(bytes),
        DType::I32 | DType::U32 | DType::Bool => None,
    }
}
