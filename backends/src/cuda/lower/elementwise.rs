//! A fused elementwise chain as one kernel, whose text is written here: a register for each register of the chain.

use std::fmt::Write;

use moebius_ir::ops::Elementwise;
use moebius_ir::{DType, Graph, Node};

use super::Lowered;
use crate::chain::{Chain, Language, is_quick};
use crate::cuda::launch::{Arg, Launch};
use crate::cuda::source::{FUNCTIONS, Source, VECTORS};

const THREADS: usize = 256;
/// From here on a thread takes several elements: with fewer, more threads are faster.
const MANY: usize = 4096;

/// The type an element is stored as.
pub(super) fn stored(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
        DType::I32 => "int",
        DType::U32 => "u32",
        DType::Bool => "u8",
    }
}

/// The type of a register.
fn register(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => "float",
        DType::I32 => "int",
        DType::U32 => "u32",
        DType::Bool => "u8",
    }
}

fn convert(to: DType) -> &'static str {
    match to {
        DType::F32 | DType::Bf16 | DType::F16 => "to_f32",
        DType::I32 => "to_int",
        DType::U32 => "to_uint",
        DType::Bool => "to_bool",
    }
}

/// CUDA's C++.
pub(super) struct Cpp;

impl Language for Cpp {
    fn declare(&self, r: usize, dtype: DType) -> String {
        format!("{} r{r}", register(dtype))
    }

    fn literal(&self, dtype: DType, value: f64) -> String {
        let value = dtype.round(value);
        match dtype {
            DType::F32 | DType::Bf16 | DType::F16 => format!("__uint_as_float(0x{:08x}u)", (value as f32).to_bits()),
            DType::I32 => format!("(int)0x{:08x}u", value as i32),
            DType::U32 => format!("0x{:08x}u", value as u32),
            DType::Bool => format!("(u8){}", u8::from(value != 0.0)),
        }
    }

    fn call(&self, function: &str, result: DType, _arguments: DType, args: &[String]) -> String {
        let form = is_quick(function, result).map_or(String::new(), |quick| format!("<{}>", u8::from(quick)));
        format!("{function}{form}({})", args.join(", "))
    }

    fn compare(&self, sign: &str, args: &[String]) -> String {
        args.join(&format!(" {sign} "))
    }

    fn select(&self, args: &[String]) -> String {
        format!("{} ? {} : {}", args[0], args[1], args[2])
    }

    fn convert(&self, to: DType, _from: DType, arg: &str) -> String {
        format!("{}({arg})", convert(to))
    }
}

/// The coordinates `c0`, `c1`, .. of element `i` of a chain, where some operand is read by them.
pub(super) fn coordinates(chain: &Chain<'_>) -> String {
    let mut text = String::new();
    if chain.axes.has_coordinates() {
        // Division of 32-bit numbers is many times faster.
        let index = if chain.elements <= i32::MAX as usize { "u32" } else { "u64" };
        let _ = writeln!(text, "    {index} rest = ({index})i;");
        for (axis, extent) in chain.axes.extents.iter().enumerate().rev() {
            let _ = writeln!(text, "    {index} c{axis} = rest % {extent}u; rest /= {extent}u;");
        }
    }
    text
}

pub(super) fn lower_elementwise(graph: &Graph, node: &Node, op: &Elementwise) -> Lowered {
    let chain = Chain::of(graph, node, op)?;
    let (dtypes, loaded, axes, elements) = (&chain.dtypes, &chain.loaded, &chain.axes, chain.elements);

    let mut parameters = vec!["i64 n".to_owned()];
    let mut args = vec![Arg::size(elements)];
    for &i in loaded {
        parameters.push(format!("const {}* p{i}", stored(dtypes[i])));
        args.push(Arg::Operand(i));
    }
    for (o, &value) in node.results.iter().enumerate() {
        parameters.push(format!("{}* o{o}", stored(graph.ty(value).dtype)));
        args.push(Arg::Result(o));
    }
    // 16 bytes of the narrowest floats, if that many elements lie together.
    let halves = dtypes.iter().any(|d| d.is_float() && d.bytes() == 2);
    let sizes: &[usize] = if halves { &[8, 4] } else { &[4] };
    let many = sizes.iter().copied().find(|&n| elements >= MANY && axes.together(n));
    let own = many.unwrap_or(1);
    let mut body = format!("KERNEL elementwise({}) {{\n    begin();\n", parameters.join(", "));
    let _ = writeln!(body, "    i64 i = ((i64)blockIdx.x * {THREADS} + threadIdx.x) * {own};\n    if (i >= n) return;");
    body.push_str(&coordinates(&chain));
    if many.is_some() {
        for (at, i) in loaded.iter().enumerate() {
            let index = axes.index(at, "(i64)");
            let _ = match axes.is_stretched(at) {
                true => writeln!(body, "    {} v{i} = p{i}[{index}];", stored(dtypes[*i])),
                false => writeln!(body, "    auto v{i} = load_vector<{own}>(p{i} + {index});"),
            };
        }
        for (o, &value) in node.results.iter().enumerate() {
            let _ = writeln!(body, "    Vector<{}, {own}> w{o};", stored(graph.ty(value).dtype));
        }
        let _ = writeln!(body, "#pragma unroll\n    for (int j = 0; j < {own}; j++) {{");
    }
    let statements = chain.statements(&Cpp, |at| {
        let element = match (many.is_some(), axes.is_stretched(at)) {
            (false, _) => format!("p{}[{}]", loaded[at], axes.index(at, "(i64)")),
            (true, true) => format!("v{}", loaded[at]),
            (true, false) => format!("v{}.at[j]", loaded[at]),
        };
        if dtypes[loaded[at]].is_float() { format!("to_float({element})") } else { element }
    });
    body.push_str(&statements);
    for (o, (r, dtype)) in chain.results().enumerate() {
        let value = if dtype.is_float() { format!("from_float<{}>(r{r})", stored(dtype)) } else { format!("r{r}") };
        let place = if many.is_some() { format!("w{o}.at[j]") } else { format!("o{o}[i]") };
        let _ = writeln!(body, "    {place} = {value};");
    }
    if many.is_some() {
        body.push_str("    }\n");
        for o in 0..node.results.len() {
            let _ = writeln!(body, "    store_vector<{own}>(o{o} + i, w{o});");
        }
    }
    body.push_str("}\n");
    let source = Source::generated("elementwise.cu", &[FUNCTIONS, VECTORS], body).exact();
    Ok(Launch::one(source, "elementwise", [(elements / own).div_ceil(THREADS), 1, 1], THREADS as u32, args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_keep_their_bits() {
        assert_eq!(Cpp.literal(DType::F32, 0.1), "__uint_as_float(0x3dcccccdu)");
        assert_eq!(Cpp.literal(DType::Bf16, f64::NEG_INFINITY), "__uint_as_float(0xff800000u)");
        assert_eq!(Cpp.literal(DType::I32, -1.0), "(int)0xffffffffu");
        assert_eq!(
            (Cpp.literal(DType::U32, 4e9), Cpp.literal(DType::Bool, 1.0)),
            ("0xee6b2800u".into(), "(u8)1".into())
        );
    }
}
