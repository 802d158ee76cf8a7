//! Parameters that a graph reads in one narrower float alone become parameters of that dtype, without the cast.
//!
//! Not one of [`super::optimise`]'s passes, as it changes what a caller must store.

use smallvec::smallvec;

use crate::dtype::DType;
use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::ops::{Input, Op, Role};

/// How the values of a graph are read.
#[derive(Clone, Copy, PartialEq)]
enum Read {
    /// Not yet.
    Never,
    /// By casts to this dtype alone.
    Cast(DType),
    /// Otherwise.
    AsIs,
}

/// The graph with each parameter in the dtype in which all its readers take it, where that is a narrower float than its own and
/// the graph does not update it. Results keep their bits if the parameters are rounded as a cast does, to nearest even.
///
/// # Errors
/// None on a verified graph.
pub fn narrow_parameters(graph: &Graph) -> Result<Graph> {
    let mut reads = vec![Read::Never; graph.value_count()];
    let mut read = |value: Value, how: Read| {
        let known = &mut reads[value.index()];
        *known = if *known == Read::Never || *known == how { how } else { Read::AsIs };
    };
    for node in graph.nodes() {
        for &operand in &node.operands {
            read(operand, if let Op::Cast(cast) = &node.op { Read::Cast(cast.dtype) } else { Read::AsIs });
        }
    }
    graph.outputs().iter().for_each(|(_, v)| read(*v, Read::AsIs));
    graph.updates().iter().for_each(|u| [u.state, u.new].into_iter().for_each(|v| read(v, Read::AsIs)));
    graph.rebuild(|out, _, node, operands| {
        if let (Some(input), Some(&value)) = (node.op.as_input(), node.results.first())
            && let (Role::Parameter, Read::Cast(dtype)) = (input.role, reads[value.index()])
            && dtype.is_float()
            && input.ty.dtype.is_float()
            && dtype.bytes() < input.ty.dtype.bytes()
        {
            let mut narrow = node.clone();
            let mut ty = input.ty.clone();
            ty.dtype = dtype;
            narrow.op = Op::Input(Input { ty, ..input.clone() });
            return out.push_copy(&narrow, operands);
        }
        if let Op::Cast(cast) = &node.op
            && out.ty(operands[0]).dtype == cast.dtype
        {
            return Ok(smallvec![operands[0]]);
        }
        out.push_copy(node, operands)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::TensorType;
    use crate::verify::{Stage, verify};

    /// `read` is only cast to bf16; `both` is cast and added; `moved` is updated; `fed` is no parameter.
    #[test]
    fn only_parameters_read_by_one_cast_are_narrowed() {
        let ty = || TensorType::f32([3]);
        let mut g = Graph::new();
        let read = g.parameter("read", ty()).unwrap();
        let both = g.parameter("both", ty()).unwrap();
        let moved = g.parameter("moved", ty()).unwrap();
        let unread = g.parameter("unread", ty()).unwrap();
        let fed = g.feed("fed", ty()).unwrap();
        let narrow: Vec<Value> =
            [read, both, moved, fed].into_iter().map(|v| g.cast(v, DType::Bf16).unwrap()).collect();
        let twice = g.cast(read, DType::Bf16).unwrap();
        let mut sum = g.add(narrow[0], twice).unwrap();
        for &v in &narrow[1..] {
            sum = g.add(sum, v).unwrap();
        }
        let wide = g.add(both, fed).unwrap();
        let next = g.add(moved, wide).unwrap();
        g.update(moved, next).unwrap();
        g.output("sum", sum).unwrap();
        let narrowed = narrow_parameters(&g).unwrap();
        verify(&narrowed, Stage::Built).unwrap();
        let dtype =
            |name: &str| narrowed.inputs().iter().find(|(n, _)| n == name).map(|(_, v)| narrowed.ty(*v).dtype).unwrap();
        assert_eq!(dtype("read"), DType::Bf16);
        for name in ["both", "moved", "unread", "fed"] {
            assert_eq!(dtype(name), DType::F32, "{name}");
        }
        let casts = narrowed.nodes().iter().filter(|n| n.op.name() == "cast").count();
        assert_eq!(casts, 3);
        let _ = unread;
    }

    #[test]
    fn nothing_is_widened() {
        let mut g = Graph::new();
        let p = g.parameter("p", TensorType::new(DType::Bf16, [2])).unwrap();
        let wide = g.cast(p, DType::F32).unwrap();
        g.output("wide", wide).unwrap();
        assert_eq!(narrow_parameters(&g).unwrap().to_text(), g.to_text());
    }
}
