//! The graph: nodes in the order they were made, each a use of one op. A value is the result of exactly one node, and
//! a node's operands were made before it, so node order is always a valid order of execution.

use std::collections::HashMap;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::error::{Error, Result, Site};
use crate::ops::{Input, Op, Role};
use crate::types::TensorType;

/// A value of one graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub(crate) u32);

impl Value {
    /// Its number, as printed after `%`.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A node of one graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// Its position in the graph.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One use of an op.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it computes.
    pub op: Op,
    /// What it computes from.
    pub operands: SmallVec<[Value; 4]>,
    /// What it defines.
    pub results: SmallVec<[Value; 3]>,
    /// The model part it belongs to, such as `layers.3/moe`.
    pub scope: Arc<str>,
    /// The line of model code that made it.
    pub site: Site,
}

#[derive(Clone, Debug, PartialEq)]
struct ValueInfo {
    ty: TensorType,
    node: NodeId,
}

/// After a run, the storage of `state` holds `new`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// A parameter or state input.
    pub state: Value,
    /// Its value from the next run on.
    pub new: Value,
}

/// A program over tensors of static shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    nodes: Vec<Node>,
    values: Vec<ValueInfo>,
    inputs: Vec<(String, Value)>,
    outputs: Vec<(String, Value)>,
    updates: Vec<Update>,
    scope: Vec<String>,
    scope_text: Arc<str>,
    names: HashMap<String, Value>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Graph::default()
    }

    /// All nodes, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// All nodes with their ids, in order.
    pub fn nodes_with_ids(&self) -> impl ExactSizeIterator<Item = (NodeId, &Node)> + DoubleEndedIterator {
        self.nodes.iter().enumerate().map(|(i, n)| (NodeId(i as u32), n))
    }

    /// One node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// Number of values.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// All values.
    pub fn values(&self) -> impl ExactSizeIterator<Item = Value> + use<> {
        (0..self.values.len() as u32).map(Value)
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> &TensorType {
        &self.values[value.index()].ty
    }

    /// The extents of a value.
    pub fn shape(&self, value: Value) -> &[usize] {
        &self.ty(value).shape
    }

    /// The node that defines a value.
    pub fn producer(&self, value: Value) -> NodeId {
        self.values[value.index()].node
    }

    /// The value whose storage a value has: through all aliases, such as reshapes.
    pub fn alias_base(&self, mut value: Value) -> Value {
        while self.node(self.producer(value)).op.is_alias() {
            value = self.node(self.producer(value)).operands[0];
        }
        value
    }

    /// Inputs with their names, in the order they were made.
    pub fn inputs(&self) -> &[(String, Value)] {
        &self.inputs
    }

    /// The input of this name.
    pub fn input_named(&self, name: &str) -> Option<Value> {
        self.names.get(name).copied()
    }

    /// Name and role of an input value; `None` for any other value.
    pub fn input_of(&self, value: Value) -> Option<&Input> {
        self.node(self.producer(value)).op.as_input()
    }

    /// Outputs with their names.
    pub fn outputs(&self) -> &[(String, Value)] {
        &self.outputs
    }

    /// State updates.
    pub fn updates(&self) -> &[Update] {
        &self.updates
    }

    /// Runs `build` with `name` appended to the scope of every node it makes.
    pub fn scoped<R>(&mut self, name: impl Into<String>, build: impl FnOnce(&mut Graph) -> R) -> R {
        self.scope.push(name.into());
        self.scope_text = self.scope.join("/").into();
        let result = build(self);
        self.scope.pop();
        self.scope_text = self.scope.join("/").into();
        result
    }

    /// Appends a node and returns its results. `site` is the caller's line.
    ///
    /// # Errors
    /// [`Error::Operands`] if the op's shape rule refuses the operands, [`Error::Duplicate`] for a second input of one name.
    pub fn push(&mut self, op: Op, operands: &[Value], site: Site) -> Result<SmallVec<[Value; 3]>> {
        let scope = Arc::clone(&self.scope_text);
        self.push_scoped(op, operands, site, scope)
    }

    pub(crate) fn push_scoped(
        &mut self,
        op: Op,
        operands: &[Value],
        site: Site,
        scope: Arc<str>,
    ) -> Result<SmallVec<[Value; 3]>> {
        let found: SmallVec<[TensorType; 4]> = operands.iter().map(|&v| self.ty(v).clone()).collect();
        let refuse = |operand, wanted, found: &[TensorType]| Error::Operands {
            op: op.name(),
            operand,
            wanted,
            found: found.to_vec(),
            site: site.clone(),
        };
        let types = op.infer(&found).map_err(|m| refuse(m.operand, m.wanted, &found))?;
        if let Some(ty) = types.iter().find(|t| !t.shape.addressable()) {
            return Err(refuse(None, format!("results that can be addressed, not {ty}"), &found));
        }
        if let Some(input) = op.as_input()
            && self.names.contains_key(&input.name)
        {
            return Err(Error::Duplicate { what: "input", name: input.name.clone(), site });
        }
        let node = NodeId(self.nodes.len() as u32);
        let results: SmallVec<[Value; 3]> = types
            .into_iter()
            .map(|ty| {
                self.values.push(ValueInfo { ty, node });
                Value(self.values.len() as u32 - 1)
            })
            .collect();
        if let Some(input) = op.as_input() {
            self.inputs.push((input.name.clone(), results[0]));
            self.names.insert(input.name.clone(), results[0]);
        }
        self.nodes.push(Node { op, operands: operands.into(), results: results.clone(), scope, site });
        Ok(results)
    }

    /// Lets the result of a cast be read from a state of this name from now on, and not computed: whoever runs the graph keeps it.
    ///
    /// # Errors
    /// [`Error::Duplicate`] if an input has the name.
    ///
    /// # Panics
    /// If `value` is not the result of a cast.
    #[track_caller]
    pub fn store_cast(&mut self, value: Value, name: impl Into<String>) -> Result<()> {
        let (name, ty) = (name.into(), self.ty(value).clone());
        if self.names.contains_key(&name) {
            return Err(Error::Duplicate { what: "input", name, site: Site::caller() });
        }
        let node = self.producer(value).index();
        assert!(matches!(self.nodes[node].op, Op::Cast(_)), "the result of a cast");
        self.nodes[node].op = Op::Input(Input { name: name.clone(), role: Role::State, ty });
        self.nodes[node].operands.clear();
        self.inputs.push((name.clone(), value));
        self.names.insert(name, value);
        Ok(())
    }

    /// [`Graph::push`] for an op with one result; the caller's line is that of the `#[track_caller]` method calling it.
    ///
    /// # Errors
    /// As [`Graph::push`].
    #[track_caller]
    pub(crate) fn push_one(&mut self, op: impl Into<Op>, operands: &[Value]) -> Result<Value> {
        self.push(op.into(), operands, Site::caller()).map(|r| r[0])
    }

    /// [`Graph::push`] for an op with `N` results.
    ///
    /// # Errors
    /// As [`Graph::push`].
    #[track_caller]
    pub(crate) fn push_all<const N: usize>(&mut self, op: impl Into<Op>, operands: &[Value]) -> Result<[Value; N]> {
        let results = self.push(op.into(), operands, Site::caller())?;
        Ok(std::array::from_fn(|i| results[i]))
    }

    /// Names a value as an output of the graph.
    ///
    /// # Errors
    /// [`Error::Duplicate`] if the name is taken.
    #[track_caller]
    pub fn output(&mut self, name: impl Into<String>, value: Value) -> Result<()> {
        let name = name.into();
        if self.outputs.iter().any(|(n, _)| *n == name) {
            return Err(Error::Duplicate { what: "output", name, site: Site::caller() });
        }
        self.outputs.push((name, value));
        Ok(())
    }

    /// The output of this name.
    pub fn output_named(&self, name: &str) -> Option<Value> {
        self.outputs.iter().find(|(n, _)| n == name).map(|&(_, v)| v)
    }

    /// From the next run on, the parameter or state `state` holds `new`.
    ///
    /// # Errors
    /// [`Error::Update`] if `state` is a feed or no input, or the types differ; [`Error::Duplicate`] for a second update.
    #[track_caller]
    pub fn update(&mut self, state: Value, new: Value) -> Result<()> {
        let site = Site::caller();
        let name = match self.input_of(state) {
            Some(input) if input.role != Role::Feed => input.name.clone(),
            Some(input) => {
                let (name, wanted) = (input.name.clone(), "a parameter or state".to_owned());
                return Err(Error::Update { name, wanted, found: "a feed".to_owned(), site });
            }
            None => {
                let (name, wanted) = (format!("%{}", state.0), "a parameter or state".to_owned());
                return Err(Error::Update { name, wanted, found: "a computed value".to_owned(), site });
            }
        };
        if self.input_of(new).is_some_and(|i| i.role != Role::Feed) {
            let (wanted, found) = ("a computed value or a feed".to_owned(), "another parameter or state".to_owned());
            return Err(Error::Update { name, wanted, found, site });
        }
        if self.ty(state) != self.ty(new) {
            let (wanted, found) = (self.ty(state).to_string(), self.ty(new).to_string());
            return Err(Error::Update { name, wanted, found, site });
        }
        if self.updates.iter().any(|u| u.state == state) {
            return Err(Error::Duplicate { what: "update", name, site });
        }
        self.updates.push(Update { state, new });
        Ok(())
    }

    /// The updates there are so far are carried out only in runs in which `condition`, a bool scalar, holds; in others the
    /// parameters and states keep what they hold.
    ///
    /// # Errors
    /// [`Error::Operands`] if the condition is no bool scalar.
    #[track_caller]
    pub fn update_only_if(&mut self, condition: Value) -> Result<()> {
        let condition = self.reshape(condition, [])?;
        for i in 0..self.updates.len() {
            let Update { state, new } = self.updates[i];
            self.updates[i].new = self.select(condition, new, state)?;
        }
        Ok(())
    }

    /// A new graph with some nodes replaced or left out: `rewrite` is called for every node in order with its operands
    /// already translated, and returns the values that stand for the node's results. Outputs and updates are translated;
    /// inputs are kept in any case, so that a pass cannot change what a caller must feed.
    ///
    /// # Errors
    /// Whatever `rewrite` returns.
    pub(crate) fn rebuild(
        &self,
        mut rewrite: impl FnMut(&mut Graph, NodeId, &Node, &[Value]) -> Result<SmallVec<[Value; 3]>>,
    ) -> Result<Graph> {
        let mut out = Graph::new();
        let mut map: Vec<Option<Value>> = vec![None; self.values.len()];
        for (id, node) in self.nodes_with_ids() {
            let operands: SmallVec<[Value; 4]> = node.operands.iter().filter_map(|v| map[v.index()]).collect();
            let results = rewrite(&mut out, id, node, &operands)?;
            for (old, new) in node.results.iter().zip(results) {
                map[old.index()] = Some(new);
            }
        }
        out.adopt_ends(self, &map);
        Ok(out)
    }

    /// Takes over the outputs and updates of `from`, whose values `map` translates.
    pub(crate) fn adopt_ends(&mut self, from: &Graph, map: &[Option<Value>]) {
        let translate =
            |v: Value| map[v.index()].unwrap_or_else(|| unreachable!("a pass dropped a value that is used"));
        self.outputs = from.outputs.iter().map(|(n, v)| (n.clone(), translate(*v))).collect();
        self.updates =
            from.updates.iter().map(|u| Update { state: translate(u.state), new: translate(u.new) }).collect();
    }

    /// Appends `node` of another graph with translated operands.
    pub(crate) fn push_copy(&mut self, node: &Node, operands: &[Value]) -> Result<SmallVec<[Value; 3]>> {
        self.push_scoped(node.op.clone(), operands, node.site.clone(), Arc::clone(&node.scope))
    }
}
