//! Reverse-mode differentiation over the graph: one walk that knows no op by name, calling each op's `vjp`.

use smallvec::SmallVec;

use crate::error::{Error, Result, Site};
use crate::graph::{Graph, Value};

/// What a vjp says about one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cotangent {
    /// The cotangent of the operand, of the operand's type.
    Value(Value),
    /// The derivative is zero by the op's definition (an index, a mask, a frozen choice), or was not asked for.
    Zero,
}

/// What a vjp is given.
pub struct Vjp<'a> {
    /// The graph to emit nodes into.
    pub graph: &'a mut Graph,
    /// The node's operands.
    pub operands: &'a [Value],
    /// The node's results.
    pub results: &'a [Value],
    /// Cotangent of each result; `None` where nothing depends on it.
    pub cotangents: &'a [Option<Value>],
    /// Whether an operand's cotangent is asked for.
    pub needed: &'a [bool],
    /// Where the node was made; emitted nodes carry it.
    pub site: Site,
}

impl Vjp<'_> {
    /// Cotangent of the only differentiable result, which is there whenever a vjp is called for a one-result op.
    pub fn cotangent(&self) -> Value {
        self.cotangents[0].unwrap_or_else(|| unreachable!("a vjp is called only when a cotangent is there"))
    }

    /// The answer of an op that has no gradient: an error naming the first operand asked for.
    ///
    /// # Errors
    /// Always [`Error::NotDifferentiable`].
    pub fn refuse(&self, op: &'static str, why: &'static str) -> Result<SmallVec<[Cotangent; 4]>> {
        let operand = self.needed.iter().position(|&n| n).unwrap_or(0);
        Err(Error::NotDifferentiable { op, operand, why, site: self.site.clone() })
    }

    /// `Cotangent::Value` of what `emit` returns if operand `operand` is asked for, else zero without emitting anything.
    ///
    /// # Errors
    /// Those of `emit`.
    pub fn when(&mut self, operand: usize, emit: impl FnOnce(&mut Self) -> Result<Value>) -> Result<Cotangent> {
        if self.needed[operand] { emit(self).map(Cotangent::Value) } else { Ok(Cotangent::Zero) }
    }
}

/// Emits into `graph` the gradient of the scalar float `loss` with respect to each value of `wrt`, in order. A value that
/// the loss does not depend on gets zeros.
///
/// # Errors
/// [`Error::Gradients`] if `loss` is no float scalar; [`Error::NotDifferentiable`] if an op on a path from `wrt` to `loss` has
/// no gradient there: a severed path is an error here, never a silent zero.
#[track_caller]
pub fn gradients(graph: &mut Graph, loss: Value, wrt: &[Value]) -> Result<Vec<Value>> {
    let site = Site::caller();
    let ty = graph.ty(loss).clone();
    if !ty.dtype.is_float() || ty.elements() != 1 {
        return Err(Error::Gradients { wanted: "a float scalar as loss", found: ty.to_string(), site });
    }
    if let Some(&v) = wrt.iter().find(|&&v| !graph.ty(v).dtype.is_float()) {
        let found = graph.ty(v).to_string();
        return Err(Error::Gradients { wanted: "floats to differentiate by", found, site });
    }

    // `depends[v]`: v is a float that some value of `wrt` flows into through floats.
    let forward_values = graph.value_count();
    let mut depends = vec![false; forward_values];
    wrt.iter().for_each(|v| depends[v.index()] = true);
    for node in graph.nodes() {
        if node.operands.iter().any(|v| depends[v.index()]) {
            for &r in &node.results {
                depends[r.index()] |= graph.ty(r).dtype.is_float();
            }
        }
    }

    let mut cotangents: Vec<Option<Value>> = vec![None; forward_values];
    let one = graph.scoped("backward", |g| g.splat(ty, 1.0))?;
    cotangents[loss.index()] = Some(one);
    let last = graph.producer(loss).index();
    for index in (0..=last).rev() {
        let node = graph.nodes()[index].clone();
        let needed: SmallVec<[bool; 4]> = node.operands.iter().map(|v| depends[v.index()]).collect();
        let incoming: SmallVec<[Option<Value>; 3]> = node.results.iter().map(|r| cotangents[r.index()]).collect();
        if incoming.iter().all(Option::is_none) || !needed.contains(&true) {
            continue;
        }
        let scope = format!("backward/{}", node.scope);
        let outgoing = graph.scoped(scope, |g| {
            let mut vjp = Vjp {
                graph: g,
                operands: &node.operands,
                results: &node.results,
                cotangents: &incoming,
                needed: &needed,
                site: node.site.clone(),
            };
            let outgoing = node.op.vjp(&mut vjp)?;
            assert_eq!(outgoing.len(), node.operands.len(), "{}: one cotangent an operand", node.op.name());
            for (i, (&operand, cotangent)) in node.operands.iter().zip(&outgoing).enumerate() {
                let Cotangent::Value(new) = *cotangent else { continue };
                if !needed[i] {
                    continue;
                }
                assert_eq!(g.ty(operand), g.ty(new), "{}: cotangent of operand {i}", node.op.name());
                let slot = &mut cotangents[operand.index()];
                *slot = Some(match *slot {
                    None => new,
                    Some(old) => g.add(old, new)?,
                });
            }
            Ok::<_, Error>(())
        });
        outgoing?;
    }
    wrt.iter()
        .map(|&v| match cotangents[v.index()] {
            Some(c) => Ok(c),
            None => {
                let ty = graph.ty(v).clone();
                graph.scoped("backward", |g| g.splat(ty, 0.0))
            }
        })
        .collect()
}
