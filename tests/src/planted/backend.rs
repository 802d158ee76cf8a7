//! A backend that computes each node by the reference, and the nodes of one bug wrongly.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use moebius_backends::cpu::Cpu;
use moebius_backends::{Backend, Error, Executable, Instance, NonFinite, Result, Store};
use moebius_ir::{Graph, Node, NodeId, Op, Plan, Tensor, TensorType};

use super::Bug;

/// What stood in memory before, where nothing fills it with NaN.
const LEFT_BY_OTHERS: f64 = 3.0;

/// One use of an op in a run: what a bug is given.
pub struct Launch<'a> {
    /// The graph as the passes leave it.
    pub graph: &'a Graph,
    /// The node.
    pub node: &'a Node,
    /// What an element holds that a kernel does not write.
    pub unwritten: f64,
    values: &'a [Option<Tensor>],
}

impl Launch<'_> {
    /// Any value that has been computed, by its number.
    ///
    /// # Panics
    /// If it has not been: nodes run in their order.
    pub fn value(&self, value: moebius_ir::Value) -> &Tensor {
        self.values[value.index()].as_ref().unwrap_or_else(|| panic!("%{} comes later", value.index()))
    }

    /// All operands.
    pub fn operands(&self) -> Vec<&Tensor> {
        self.node.operands.iter().map(|&v| self.value(v)).collect()
    }

    /// The right results.
    pub fn right(&self) -> Vec<Tensor> {
        self.by(&self.node.op, &self.operands())
    }

    /// The results, of the node's types, that another op or other operands give.
    pub fn by(&self, op: &Op, operands: &[&Tensor]) -> Vec<Tensor> {
        let types: Vec<TensorType> = self.node.results.iter().map(|&r| self.graph.ty(r).clone()).collect();
        op.reference(operands, &types)
    }

    /// The right results with operand `i` replaced.
    pub fn with(&self, i: usize, operand: &Tensor) -> Vec<Tensor> {
        let mut operands = self.operands();
        operands[i] = operand;
        self.by(&self.node.op, &operands)
    }

    /// Whether the node belongs to a gradient.
    pub fn is_backward(&self) -> bool {
        self.node.scope.starts_with("backward")
    }
}

/// The backend; without a bug all its results are the reference's.
pub struct Planted {
    inner: Arc<Cpu>,
    bug: Option<&'static Bug>,
    checked: bool,
}

impl Planted {
    /// With this bug, if any. Where memory is `checked`, what nobody writes is NaN.
    ///
    /// # Panics
    /// If the thread of the CPU backend, which plans and stores, cannot be started.
    pub fn new(bug: Option<&'static Bug>, checked: bool) -> Planted {
        let inner = Cpu::new(Some(1)).unwrap_or_else(|e| panic!("{e}"));
        Planted { inner: Arc::new(inner), bug, checked }
    }
}

impl Backend for Planted {
    fn name(&self) -> &'static str {
        "planted"
    }

    fn describe(&self) -> String {
        format!("the reference with the bug {:?}", self.bug.map_or("none", |b| b.name))
    }

    fn plan(&self, graph: Graph) -> Result<Plan> {
        self.inner.plan(graph)
    }

    fn compile(&self, plan: Plan) -> Result<Arc<dyn Executable>> {
        let unwritten = if self.checked { f64::NAN } else { LEFT_BY_OTHERS };
        Ok(Arc::new(PlantedExecutable { plan, bug: self.bug, unwritten }))
    }

    fn free_memory(&self) -> Option<u64> {
        self.inner.free_memory()
    }

    fn take_notes(&self) -> Vec<String> {
        Vec::new()
    }

    fn new_store(&self) -> Box<dyn Store> {
        self.inner.new_store()
    }

    fn checked(&self) -> Option<Arc<dyn Backend>> {
        Some(Arc::new(Planted { inner: Arc::clone(&self.inner), bug: self.bug, checked: true }))
    }
}

struct PlantedExecutable {
    plan: Plan,
    bug: Option<&'static Bug>,
    unwritten: f64,
}

impl Executable for PlantedExecutable {
    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn instantiate(&self) -> Result<Box<dyn Instance>> {
        let graph = self.plan.graph().clone();
        let (bug, unwritten) = (self.bug, self.unwritten);
        Ok(Box::new(PlantedInstance { graph, bug, unwritten, feeds: HashMap::new(), values: Vec::new() }))
    }
}

struct PlantedInstance {
    graph: Graph,
    bug: Option<&'static Bug>,
    unwritten: f64,
    feeds: HashMap<String, Tensor>,
    values: Vec<Option<Tensor>>,
}

impl PlantedInstance {
    fn results(&self, node: &Node, store: &dyn Store) -> Result<Vec<Tensor>> {
        if let Some(input) = node.op.as_input() {
            let tensor = match (input.role, self.feeds.get(&input.name)) {
                (moebius_ir::Role::Feed, Some(fed)) => fed.clone(),
                (moebius_ir::Role::Feed, None) => Tensor::zeros(input.ty.clone()),
                (moebius_ir::Role::Parameter | moebius_ir::Role::State, _) => {
                    Tensor::from_bytes(input.ty.clone(), &store.bytes(&input.name)?)
                }
            };
            return Ok(vec![tensor]);
        }
        let launch = Launch { graph: &self.graph, node, unwritten: self.unwritten, values: &self.values };
        let wrong = self.bug.filter(|b| b.op == node.op.name()).and_then(|b| (b.wrong)(&launch));
        let results = wrong.unwrap_or_else(|| launch.right());
        Ok(results.into_iter().map(Tensor::rounded).collect())
    }
}

impl Instance for PlantedInstance {
    fn write(&mut self, feed: &str, bytes: &[u8]) -> Result<()> {
        let there = || self.graph.inputs().iter().map(|(n, _)| n.clone()).collect();
        let Some(value) = self.graph.input_named(feed) else {
            return Err(Error::NoSuch { what: "feed", name: feed.into(), there: there() });
        };
        self.feeds.insert(feed.into(), Tensor::from_bytes(self.graph.ty(value).clone(), bytes));
        Ok(())
    }

    fn run(&mut self, store: &mut dyn Store) -> Result<()> {
        self.profile(store).map(|_| ())
    }

    fn read(&self, output: &str, out: &mut [u8]) -> Result<()> {
        let there = || self.graph.outputs().iter().map(|(n, _)| n.clone()).collect();
        let value = self.graph.output_named(output).and_then(|v| self.values.get(v.index())?.as_ref());
        let Some(value) = value else {
            return Err(Error::NoSuch { what: "output", name: output.into(), there: there() });
        };
        out.copy_from_slice(&value.to_bytes());
        Ok(())
    }

    fn first_non_finite(&mut self, store: &mut dyn Store) -> Result<Option<NonFinite>> {
        self.run(store)?;
        for node in self.graph.nodes() {
            for tensor in node.results.iter().filter_map(|r| self.values[r.index()].as_ref()) {
                if let Some(index) = tensor.data.iter().position(|v| !v.is_finite()) {
                    return Ok(Some(NonFinite {
                        op: node.op.name(),
                        scope: node.scope.to_string(),
                        site: node.site.clone(),
                        ty: tensor.ty.clone(),
                        index,
                        value: tensor.data[index] as f32,
                    }));
                }
            }
        }
        Ok(None)
    }

    fn profile(&mut self, store: &mut dyn Store) -> Result<Vec<(NodeId, f64)>> {
        self.values = vec![None; self.graph.value_count()];
        let mut times = Vec::new();
        for (id, node) in self.graph.nodes_with_ids() {
            let begun = Instant::now();
            let results = self.results(node, store)?;
            for (value, result) in node.results.iter().zip(results) {
                self.values[value.index()] = Some(result);
            }
            times.push((id, begun.elapsed().as_secs_f64()));
        }
        for update in self.graph.updates() {
            let (Some(state), Some(new)) = (self.graph.input_of(update.state), &self.values[update.new.index()]) else {
                unreachable!("an update is of an input, and all values were computed")
            };
            store.write(&state.name, &new.to_bytes())?;
        }
        Ok(times)
    }
}
