//! Chains that are joined onto a product: the text by which its kernel does their work on each element that it stores.

use std::fmt::Write;

use moebius_ir::{DType, Graph, NodeId, Op};

use super::elementwise::{coordinates, element, register};
use super::gemm::MOST_FEW;
use crate::chain::Chain;
use crate::joined::{base, is_kept};
use crate::vulkan::launch::At;
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// Buffers that a product has itself, at most.
const OF_PRODUCT: usize = 6;
/// Of a chain that reads nothing but the product, or none.
const NOTHING_BESIDE: &str = "struct Beside { nothing: u32 }\nfn beside(i: u32) -> Beside { return Beside(); }\n";
const LEAVE: &str = "fn leave(i: u32, x: f32) { leave_beside(i, x, beside(i)); }\n";

/// A chain for the kernel of the product before it.
pub(super) struct Joined<'a> {
    chain: Chain<'a>,
    /// Of the operands that are read: whether it is the product.
    product: Vec<bool>,
    /// The first of its operands and of its results.
    first: [usize; 2],
    /// The product's dtype.
    dtype: DType,
    /// Whether the product is read by others too.
    pub(super) kept: bool,
}

impl<'a> Joined<'a> {
    /// The chain of node `chain` behind node `id`, if it can be joined onto that on such a device; the first of its operands and of its
    /// results follow those of the nodes before it.
    pub(super) fn new(
        graph: &'a Graph,
        id: NodeId,
        chain: NodeId,
        first: [usize; 2],
        limits: Limits,
    ) -> Option<Joined<'a>> {
        let (node, after) = (graph.node(id), graph.node(chain));
        let product = *node.results.first()?;
        let Op::Elementwise(op) = &after.op else { return None };
        let of = Chain::of(graph, after, op).ok()?;
        // Other results share words.
        let floats = of.results().all(|(_, dtype)| dtype.is_float());
        let buffers = OF_PRODUCT + of.loaded.len() + op.outputs.len();
        let is_product: Vec<bool> = of.loaded.iter().map(|&i| base(graph, after.operands[i]) == product).collect();
        // Large tiles have no time for what else a chain reads: nobody multiplies until it is there.
        let (elements, shape) = (graph.ty(product).elements(), graph.shape(product));
        let few = elements <= MOST_FEW * shape[shape.len() - 1];
        // Where nothing is multiplied, many rows are done faster eight elements at a time.
        let multiplies = !matches!(node.op, Op::Combine(_));
        if !floats || buffers > limits.buffers || !(few || multiplies && is_product.iter().all(|&is| is)) {
            return None;
        }
        Some(Joined {
            product: is_product,
            chain: of,
            first,
            dtype: graph.ty(product).dtype,
            kept: is_kept(graph, product, chain),
        })
    }

    /// Whether eight neighbours of a row may be taken together: only the product is read.
    fn by_eight(&self) -> bool {
        self.chain.axes.together(8) && self.others().next().is_none()
    }

    /// The operands that are read beside the product.
    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        self.chain.loaded.iter().zip(&self.product).filter(|(_, product)| !**product).map(|(&i, _)| i)
    }

    /// An expression as the product's dtype would keep it.
    fn rounded(&self, x: &str) -> String {
        match self.dtype {
            DType::Bf16 => format!("round_bf16({x})"),
            DType::F16 => format!("round_f16({x})"),
            DType::F32 | DType::I32 | DType::U32 | DType::Bool => x.to_owned(),
        }
    }

    /// `Beside`, `beside` and `leave_beside`, for one element.
    fn one(&self, shader: Shader) -> Shader {
        let chain = &self.chain;
        let mut s = element(chain);
        let others: Vec<usize> = (0..self.product.len()).filter(|&at| !self.product[at]).collect();
        if others.is_empty() {
            s.push_str(NOTHING_BESIDE);
        } else {
            let field = |&at: &usize| format!("    x{at}: {},\n", register(chain.dtypes[chain.loaded[at]]));
            let _ = writeln!(s, "struct Beside {{\n{}}}", others.iter().map(field).collect::<String>());
            let other = |&at: &usize| format!("get_p{}({})", chain.loaded[at], chain.axes.index(at, ""));
            let others = others.iter().map(other).collect::<Vec<_>>().join(", ");
            let _ =
                writeln!(s, "fn beside(i: u32) -> Beside {{\n{}    return Beside({others});\n}}", coordinates(chain));
        }
        let _ = writeln!(
            s,
            "fn leave_beside(i: u32, x: f32, beside: Beside) {{\n    let v = {};\n    set_c(i, v);",
            self.rounded("x")
        );
        let of = |at: usize| if self.product[at] { "v".to_owned() } else { format!("beside.x{at}") };
        let arguments = (0..self.product.len()).map(of).collect::<Vec<_>>().join(", ");
        let _ = writeln!(s, "    let found = element({arguments});");
        for o in 0..chain.results().count() {
            let _ = writeln!(s, "    set_o{o}(i, found.o{o});");
        }
        s.push_str("}\n");
        s.push_str(LEAVE);
        let mut shader = shader.with("functions").declare(&s);
        for i in self.others() {
            shader = shader.buffer(&format!("p{i}"), chain.dtypes[i], At::Operand(self.first[0] + i));
        }
        for (o, (_, dtype)) in chain.results().enumerate() {
            shader = shader.buffer(&format!("o{o}"), dtype, At::Result(self.first[1] + o));
        }
        shader
    }

    /// `leave_eight`, for eight of a row.
    fn eight(&self, shader: Shader) -> Shader {
        let chain = &self.chain;
        let mut s = element(chain);
        s.push_str("fn leave_eight(i: u32, low: vec4<f32>, high: vec4<f32>) {\n");
        for e in 0..8 {
            let x = format!("{}.{}", if e < 4 { "low" } else { "high" }, ["x", "y", "z", "w"][e % 4]);
            let _ = writeln!(s, "    let x{e} = {};", self.rounded(&x));
        }
        let four = |name: &str, first: usize, field: &str| {
            (0..4).map(|i| format!("{name}{}{field}", first + 2 * i)).collect::<Vec<_>>().join(", ")
        };
        let _ =
            writeln!(s, "    set_eight_c(i, Eight(vec4<f32>({}), vec4<f32>({})));", four("x", 0, ""), four("x", 1, ""));
        for e in 0..8 {
            let product = vec![format!("x{e}"); self.product.len()].join(", ");
            let _ = writeln!(s, "    let v{e} = element({product});");
        }
        for o in 0..chain.results().count() {
            let field = format!(".o{o}");
            let (even, odd) = (four("v", 0, &field), four("v", 1, &field));
            let _ = writeln!(s, "    set_eight_o{o}(i, Eight(vec4<f32>({even}), vec4<f32>({odd})));");
        }
        s.push_str("}\n");
        let results = chain.results().enumerate();
        results.fold(shader.with("functions").declare(&s), |shader, (o, (_, dtype))| {
            shader.by_eight(&format!("o{o}"), dtype, At::Result(self.first[1] + o))
        })
    }
}

/// Whether elements of a result may leave a kernel eight at a time.
pub(super) fn by_eight(joined: Option<&Joined<'_>>) -> bool {
    joined.is_none_or(Joined::by_eight)
}

/// With the buffer `c` of a product's result and `leave(i, x)`, which does with an element, as it was summed up, what is to be done: it is
/// stored, or given to the chain, or both; `leave_beside(i, x, beside(i))` is the same for who asks for what is beside it before. With `eights` it is `leave_eight(i, low, high)`, for eight from a multiple of eight on.
pub(super) fn leaving(shader: Shader, (dtype, at): (DType, At), eights: bool, joined: Option<&Joined<'_>>) -> Shader {
    let at = if joined.is_some_and(|j| !j.kept) { At::Null } else { at };
    let shader = if eights { shader.with("eight").by_eight("c", dtype, at) } else { shader.buffer("c", dtype, at) };
    match (joined, eights) {
        (Some(joined), true) => joined.eight(shader),
        (Some(joined), false) => joined.one(shader),
        (None, true) => shader.declare(
            "fn leave_eight(i: u32, low: vec4<f32>, high: vec4<f32>) {\n    \
             set_eight_c(i, Eight(vec4<f32>(low.x, low.z, high.x, high.z), vec4<f32>(low.y, low.w, high.y, high.w)));\n}\n",
        ),
        (None, false) => {
            let leave = "fn leave_beside(i: u32, x: f32, beside: Beside) { set_c(i, x); }\n";
            shader.declare(&[NOTHING_BESIDE, leave, LEAVE].concat())
        }
    }
}
