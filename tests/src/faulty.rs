//! A backend with a planted fault: whatever one op gives as an output of a graph is slightly wrong. A check that does not notice
//! it checks nothing.

use std::sync::Arc;

use moebius_backends::{Backend, Executable, Instance, NonFinite, Result, Store};
use moebius_ir::{DType, Graph, NodeId, Plan, Tensor, Value};

/// Where results become wrong, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    /// The op, in the graph as the passes leave it.
    pub op: &'static str,
    /// Only results of this dtype; `None` for all.
    pub dtype: Option<DType>,
    /// What floats are multiplied with. Integers grow by 1, bools turn over.
    pub factor: f64,
    /// Only where memory is not checked, as a kernel would that reads what nobody wrote.
    pub unchecked_only: bool,
}

/// A backend whose results of one op are wrong.
pub struct Faulty {
    inner: Arc<dyn Backend>,
    fault: Fault,
    checked: bool,
}

impl Faulty {
    /// `inner` with this fault.
    pub fn new(inner: Arc<dyn Backend>, fault: Fault) -> Faulty {
        Faulty { inner, fault, checked: false }
    }
}

impl Backend for Faulty {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn describe(&self) -> String {
        format!("{}, with a fault in {}", self.inner.describe(), self.fault.op)
    }

    fn plan(&self, graph: Graph) -> Result<Plan> {
        self.inner.plan(graph)
    }

    fn compile(&self, plan: Plan) -> Result<Arc<dyn Executable>> {
        let present = !(self.checked && self.fault.unchecked_only);
        let inner = self.inner.compile(plan)?;
        Ok(Arc::new(FaultyExecutable { inner, fault: present.then_some(self.fault) }))
    }

    fn free_memory(&self) -> Option<u64> {
        self.inner.free_memory()
    }

    fn take_notes(&self) -> Vec<String> {
        self.inner.take_notes()
    }

    fn new_store(&self) -> Box<dyn Store> {
        self.inner.new_store()
    }

    fn checked(&self) -> Option<Arc<dyn Backend>> {
        self.inner
            .checked()
            .map(|inner| Arc::new(Faulty { inner, fault: self.fault, checked: true }) as Arc<dyn Backend>)
    }
}

struct FaultyExecutable {
    inner: Arc<dyn Executable>,
    fault: Option<Fault>,
}

impl Executable for FaultyExecutable {
    fn plan(&self) -> &Plan {
        self.inner.plan()
    }

    fn instantiate(&self) -> Result<Box<dyn Instance>> {
        let (graph, fault) = (self.plan().graph().clone(), self.fault);
        Ok(Box::new(FaultyInstance { inner: self.inner.instantiate()?, graph, fault }))
    }
}

struct FaultyInstance {
    inner: Box<dyn Instance>,
    graph: Graph,
    fault: Option<Fault>,
}

impl FaultyInstance {
    /// The op that computed a value; an alias computes nothing, unless it is to be the one at fault.
    fn made_by(&self, value: Value) -> &'static str {
        let node = self.graph.node(self.graph.producer(value));
        match node.op.name() {
            alias @ ("reshape" | "after") if self.fault.is_some_and(|f| f.op != alias) => {
                self.made_by(node.operands[0])
            }
            name => name,
        }
    }
}

impl Instance for FaultyInstance {
    fn write(&mut self, feed: &str, bytes: &[u8]) -> Result<()> {
        self.inner.write(feed, bytes)
    }

    fn run(&mut self, store: &mut dyn Store) -> Result<()> {
        self.inner.run(store)
    }

    fn read(&self, output: &str, out: &mut [u8]) -> Result<()> {
        self.inner.read(output, out)?;
        let (Some(fault), Some(value)) = (self.fault, self.graph.output_named(output)) else { return Ok(()) };
        let ty = self.graph.ty(value).clone();
        if self.made_by(value) != fault.op || fault.dtype.is_some_and(|d| d != ty.dtype) {
            return Ok(());
        }
        let mut tensor = Tensor::from_bytes(ty, out);
        for x in &mut tensor.data {
            *x = match tensor.ty.dtype {
                DType::F32 | DType::Bf16 | DType::F16 => *x * fault.factor,
                DType::I32 | DType::U32 => *x + 1.0,
                DType::Bool => 1.0 - *x,
            };
        }
        out.copy_from_slice(&tensor.to_bytes());
        Ok(())
    }

    fn first_non_finite(&mut self, store: &mut dyn Store) -> Result<Option<NonFinite>> {
        self.inner.first_non_finite(store)
    }

    fn profile(&mut self, store: &mut dyn Store) -> Result<Vec<(NodeId, f64)>> {
        self.inner.profile(store)
    }
}
