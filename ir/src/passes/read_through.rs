//! Reading through: an operand that was only widened or stretched is read as it was before, where the op does that itself.
//!
//! A matrix product takes one factor of 16 bits beside one of f32, so a cast to f32 before it need not be stored; an elementwise
//! op stretches its operands, so a broadcast before it need not be either. What is done to every element of a broadcast is done
//! before it. A slice that takes everything is what it takes from, if that is computed: an update may not be another state.

use crate::dtype::DType;
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::ops::Op;

/// The graph with such operands replaced; what then has no reader stays, for the removal of dead code.
///
/// # Errors
/// None on a verified graph.
pub fn read_through(graph: &Graph) -> Result<Graph> {
    graph.rebuild(|out, _, node, operands| {
        if let (Op::Unary(_) | Op::Cast(_), &[whole]) = (&node.op, operands)
            && let Op::Broadcast(_) = &out.node(out.producer(whole)).op
        {
            let stretch = out.node(out.producer(whole)).clone();
            let one = out.push_copy(node, &stretch.operands)?;
            return out.push_copy(&stretch, &one);
        }
        if let (Op::Slice(_), &[whole]) = (&node.op, operands)
            && !matches!(out.node(out.producer(whole)).op, Op::Input(_) | Op::Constant(_))
            && node.op.infer(std::slice::from_ref(out.ty(whole))).is_ok_and(|cut| cut[0] == *out.ty(whole))
        {
            return Ok([whole].into_iter().collect());
        }
        let mut operands: Vec<Value> = operands.to_vec();
        let types = |out: &Graph, operands: &[Value]| {
            node.op.infer(&operands.iter().map(|&v| out.ty(v).clone()).collect::<Vec<_>>())
        };
        let mut wanted = None;
        for i in 0..operands.len() {
            let Some(source) = behind(out, &node.op, operands[i]) else { continue };
            let mut other = operands.clone();
            other[i] = source;
            // The last operand of full shape, or of f32, has to stay as it is.
            if types(out, &other).ok() == *wanted.get_or_insert_with(|| types(out, &operands).ok()) {
                operands = other;
            }
        }
        out.push_copy(node, &operands)
    })
}

/// What the node that made `value` read, if `op` can do that node's work.
fn behind(graph: &Graph, op: &Op, value: Value) -> Option<Value> {
    let producer = graph.node(graph.producer(value));
    let source = *producer.operands.first()?;
    let widened = || graph.ty(source).dtype.is_float() && graph.ty(value).dtype == DType::F32;
    let readable = match (&producer.op, op) {
        (Op::Cast(_), Op::Matmul(_)) => widened(),
        (Op::Broadcast(_), Op::Binary(_) | Op::Compare(_) | Op::Select(_)) => true,
        (_, _) => false,
    };
    readable.then_some(source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TensorType;

    fn ops(graph: &Graph) -> Vec<&'static str> {
        let kept = crate::passes::eliminate_dead_code(graph).unwrap();
        kept.nodes().iter().map(|n| n.op.name()).filter(|n| *n != "input").collect()
    }

    #[test]
    fn a_product_reads_one_factor_of_16_bits() {
        let bf16 = |shape: [usize; 2]| TensorType::new(DType::Bf16, shape);
        for [first, second] in [[true, false], [false, true], [true, true]] {
            let mut g = Graph::new();
            let mut factor = |name, shape, narrow| {
                let ty = if narrow { bf16(shape) } else { TensorType::f32(shape) };
                let v = g.feed(name, ty).unwrap();
                g.cast(v, DType::F32).unwrap()
            };
            let (a, b) = (factor("a", [4, 3], first), factor("b", [3, 2], second));
            let product = g.matmul(a, b).unwrap();
            g.output("product", product).unwrap();
            let read = read_through(&g).unwrap();
            let wanted: &[_] = if first && second { &["cast", "matmul"] } else { &["matmul"] };
            assert_eq!(ops(&read), wanted);
            assert_eq!(read.ty(read.outputs()[0].1), &TensorType::f32([4, 2]));
        }
    }

    #[test]
    fn a_slice_of_everything_is_no_op() {
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::f32([4, 3])).unwrap();
        let y = g.neg(x).unwrap();
        for (name, of, len) in [("whole", y, 4), ("part", y, 3), ("input", x, 4)] {
            let cut = g.slice(of, 0, 0, len).unwrap();
            g.output(name, cut).unwrap();
        }
        let read = read_through(&g).unwrap();
        assert_eq!(ops(&read), ["unary", "slice", "slice"]);
        let whole = read.output_named("whole").unwrap();
        assert_eq!(read.node(read.producer(whole)).op.name(), "unary");
    }

    #[test]
    fn an_elementwise_op_stretches_what_is_not_all_it_reads() {
        let mut g = Graph::new();
        let x = g.feed("x", TensorType::f32([4, 3])).unwrap();
        let row = g.feed("row", TensorType::f32([3])).unwrap();
        let one = g.feed("one", TensorType::f32([])).unwrap();
        let [rows, ones] = [row, one].map(|v| g.broadcast(v, [4, 3]).unwrap());
        let sum = g.add(x, rows).unwrap();
        g.output("sum", sum).unwrap();
        assert_eq!(ops(&read_through(&g).unwrap()), ["binary"]);
        // What is done to the broadcast is done to what it is of.
        let negative = g.neg(rows).unwrap();
        let sum = g.add(x, negative).unwrap();
        g.output("sum of negatives", sum).unwrap();
        assert_eq!(ops(&read_through(&g).unwrap()), ["binary", "unary", "binary"]);
        // Of two broadcasts only one can go.
        let both = g.mul(ones, rows).unwrap();
        g.output("both", both).unwrap();
        assert_eq!(ops(&read_through(&g).unwrap()), ["broadcast", "binary", "unary", "binary", "binary"]);
    }
}
