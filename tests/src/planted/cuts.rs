//! Wrong gradients, as a wrong `vjp` would emit them. They are cut into the graph, so that the check by differences, which no
//! device takes part in, has to notice them.

use moebius_ir::{Graph, Node, Op, Result, Site, TensorType, Value};

/// A wrong gradient.
pub struct Cut {
    /// Its name.
    pub name: &'static str,
    /// What is wrong.
    pub what: &'static str,
    /// The op in the gradient that is used wrongly.
    pub op: &'static str,
    /// The case, by op and name, whose check by differences fails with it.
    pub noticed_by: (&'static str, &'static str),
    /// Given a backward node of that op with its operands: the results it gets instead.
    instead: fn(&mut Graph, &Node, &[Value]) -> Result<Vec<Value>>,
}

/// All of them.
pub const CUTS: &[Cut] = &[
    Cut {
        name: "severed router",
        what: "the gates pass no gradient to the router, whose losses still do (candle #2168, #3011)",
        op: "route_grad",
        noticed_by: ("moe_layer", "top-2"),
        instead: |g, node, v| zeroed(g, node, v, 2),
    },
    Cut {
        name: "severed balance loss",
        what: "the load-balancing loss passes no gradient to the router",
        op: "route_grad",
        noticed_by: ("moe_layer", "top-2"),
        instead: |g, node, v| zeroed(g, node, v, 3),
    },
    Cut {
        name: "experts without gates",
        what: "the gradient of an expert's output is not weighted by its gate",
        op: "dispatch",
        noticed_by: ("moe_layer", "top-2"),
        instead: |g, node, v| push(g, node, &v[..3]),
    },
    Cut {
        name: "expert bias without gradient",
        what: "the biases of the experts get the gradient zero",
        op: "segment_sum",
        noticed_by: ("moe_layer", "top-1"),
        instead: |g, node, v| zeroed(g, node, v, 0),
    },
    Cut {
        name: "router sees a constant token",
        what: "tokens get no gradient through their gates",
        op: "gate_grad",
        noticed_by: ("residual_moe_layer", "top-1 with capacity"),
        instead: |g, node, v| zeroed(g, node, v, 0),
    },
];

fn push(g: &mut Graph, node: &Node, operands: &[Value]) -> Result<Vec<Value>> {
    g.push(node.op.clone(), operands, node.site.clone()).map(|r| r.to_vec())
}

/// The node with zeros for operand `i`.
fn zeroed(g: &mut Graph, node: &Node, operands: &[Value], i: usize) -> Result<Vec<Value>> {
    let ty: TensorType = g.ty(operands[i]).clone();
    let mut operands = operands.to_vec();
    operands[i] = g.splat(ty, 0.0)?;
    push(g, node, &operands)
}

impl Cut {
    /// The graph with this gradient.
    ///
    /// # Errors
    /// None in a graph whose backward nodes of the op are as the `vjp`s emit them.
    pub fn apply(&self, graph: &Graph) -> Result<Graph> {
        let mut out = Graph::new();
        let mut map: Vec<Value> = Vec::with_capacity(graph.value_count());
        for node in graph.nodes() {
            let operands: Vec<Value> = node.operands.iter().map(|v| map[v.index()]).collect();
            let cut = node.op.name() == self.op && node.scope.starts_with("backward");
            let results = if cut {
                (self.instead)(&mut out, node, &operands)?
            } else {
                // Inputs are made under their names again.
                let op: Op = node.op.clone();
                out.push(op, &operands, Site::caller())?.to_vec()
            };
            map.extend(results);
        }
        for (name, value) in graph.outputs() {
            out.output(name, map[value.index()])?;
        }
        for update in graph.updates() {
            out.update(map[update.state.index()], map[update.new.index()])?;
        }
        Ok(out)
    }
}
