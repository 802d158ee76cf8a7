//! What the forward pass leaves to the backward pass, in bytes.

use super::recompute::{backward_nodes, is_emitted};
use crate::graph::Graph;
use crate::ops::{Op, Role};

/// Bytes of all values that the forward pass made or the host fed and the backward pass reads. Parameters, other state and
/// constants are not among them: they are there in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Of floats.
    pub bytes: u64,
    /// Of integers and masks: which expert, which slot, which token.
    pub index_bytes: u64,
}

/// What a graph with backward nodes keeps. True of a graph as it runs, after [`super::optimise`]: until then it has nodes
/// that are never stored.
pub fn kept_for_backward(graph: &Graph) -> Kept {
    let backward = backward_nodes(graph);
    let mut counted = vec![false; graph.value_count()];
    let mut kept = Kept::default();
    for node in graph.nodes().iter().filter(|node| is_emitted(node)) {
        for value in node.operands.iter().map(|&v| graph.alias_base(v)) {
            let producer = graph.producer(value);
            let op = &graph.node(producer).op;
            let stays = op.as_input().is_some_and(|input| input.role != Role::Feed) || matches!(op, Op::Constant(_));
            if stays || backward[producer.index()] || std::mem::replace(&mut counted[value.index()], true) {
                continue;
            }
            let ty = graph.ty(value);
            let count = if ty.dtype.is_float() { &mut kept.bytes } else { &mut kept.index_bytes };
            *count += ty.bytes() as u64;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TensorType;
    use crate::{gradients, passes};

    #[test]
    fn what_is_read_counts_once_and_what_stays_does_not() {
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::f32([4, 8])).unwrap();
        let ids = g.feed("ids", TensorType::i32([4])).unwrap();
        let (table, w) = (g.parameter("table", TensorType::f32([9, 8])), g.parameter("w", TensorType::f32([8, 8])));
        let (table, w) = (table.unwrap(), w.unwrap());
        let row = g.embedding(table, ids).unwrap();
        let sum = g.add(x, row).unwrap();
        let product = g.matmul(sum, w).unwrap();
        let folded = g.reshape(product, [32]).unwrap();
        let squared = g.mul(folded, folded).unwrap();
        let loss = g.sum_all(squared).unwrap();
        let grads = gradients(&mut g, loss, &[table, w]).unwrap();
        grads.iter().enumerate().for_each(|(i, &v)| g.output(i.to_string(), v).unwrap());
        g.output("loss", loss).unwrap();
        let kept = kept_for_backward(&passes::optimise(&g).unwrap());
        // The sum and the product, and the ids for the gradient of the table.
        assert_eq!(kept, Kept { bytes: 2 * 4 * 8 * 4, index_bytes: 4 * 4 });
    }
}
