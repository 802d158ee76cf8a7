//! A fused elementwise chain as one kernel, whose text is written here: a register for each register of the chain. A thread has an
//! element, or, where there are many floats that lie together, eight.

use std::fmt::Write;

use moebius_ir::ops::Elementwise;
use moebius_ir::{DType, Graph, Node};

use super::Lowered;
use crate::chain::{Chain, Language, is_quick};
use crate::vulkan::launch::{At, Launch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 256;
/// Elements of floats that a thread reads and stores together, if so many threads have some.
const EIGHT: usize = 8;
const LEAST_THREADS: usize = 2048;

/// Where the elements of an `Eight` are.
const PLACES: [&str; EIGHT] = ["even.x", "odd.x", "even.y", "odd.y", "even.z", "odd.z", "even.w", "odd.w"];

/// WGSL; bools are u32 in registers.
struct Wgsl;

/// The type of a register.
pub(super) fn register(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => "f32",
        DType::I32 => "i32",
        DType::U32 | DType::Bool => "u32",
    }
}

impl Language for Wgsl {
    fn declare(&self, r: usize, dtype: DType) -> String {
        format!("let r{r}: {}", register(dtype))
    }

    fn literal(&self, dtype: DType, value: f64) -> String {
        let value = dtype.round(value);
        match dtype {
            DType::F32 | DType::Bf16 | DType::F16 => {
                let value = value as f32;
                // The language has no literals of what is not a number, and a device may flush the tiniest ones.
                if value.is_normal() || value.to_bits() == 0 {
                    format!("{value:e}f")
                } else {
                    format!("from_bits(0x{:08x}u)", value.to_bits())
                }
            }
            DType::I32 => format!("bitcast<i32>(0x{:08x}u)", value as i32),
            DType::U32 => format!("0x{:08x}u", value as u32),
            DType::Bool => format!("{}u", u8::from(value != 0.0)),
        }
    }

    fn call(&self, function: &str, result: DType, arguments: DType, args: &[String]) -> String {
        let of = match arguments {
            _ if is_quick(function, result) == Some(true) => "_quick",
            DType::I32 => "_i32",
            DType::U32 => "_u32",
            DType::F32 | DType::Bf16 | DType::F16 | DType::Bool => "",
        };
        format!("{function}{of}({})", args.join(", "))
    }

    fn compare(&self, sign: &str, args: &[String]) -> String {
        // In the language's translation a NaN is not unequal to anything; not equal it is.
        match sign {
            "!=" => format!("select(1u, 0u, {} == {})", args[0], args[1]),
            sign => format!("select(0u, 1u, {} {sign} {})", args[0], args[1]),
        }
    }

    fn select(&self, args: &[String]) -> String {
        format!("select({}, {}, {} != 0u)", args[2], args[1], args[0])
    }

    fn convert(&self, to: DType, from: DType, arg: &str) -> String {
        let to = if to == DType::Bool { "bool" } else { register(to) };
        format!("{to}_of_{}({arg})", register(from))
    }
}

/// The coordinates of element `i`, if operands are read by them.
pub(super) fn coordinates(chain: &Chain<'_>) -> String {
    let mut text = String::new();
    if chain.axes.has_coordinates() {
        text.push_str("    var rest = i;\n");
        for (axis, extent) in chain.axes.extents.iter().enumerate().rev() {
            let _ = writeln!(text, "    let c{axis} = rest % {extent}u; rest = rest / {extent}u;");
        }
    }
    text
}

/// Whether threads have eight elements each: all that lie together are floats, and there are many.
fn by_eight(chain: &Chain<'_>) -> bool {
    let float = |dtype: DType| match dtype {
        DType::F32 | DType::Bf16 | DType::F16 => true,
        DType::I32 | DType::U32 | DType::Bool => false,
    };
    let read = |at: usize| chain.axes.is_stretched(at) || float(chain.dtypes[chain.loaded[at]]);
    chain.elements >= EIGHT * LEAST_THREADS
        && chain.axes.together(EIGHT)
        && (0..chain.loaded.len()).all(read)
        && chain.results().all(|(_, dtype)| float(dtype))
}

/// `element(a0, a1, ..)`, which gives an element's results from what is loaded of it.
pub(super) fn element(chain: &Chain<'_>) -> String {
    let results: Vec<(u32, DType)> = chain.results().collect();
    let fields: String = (0..results.len()).map(|o| format!("    o{o}: f32,\n")).collect();
    let given = chain.loaded.iter().enumerate().map(|(at, &l)| format!("a{at}: {}", register(chain.dtypes[l])));
    let given = given.collect::<Vec<_>>().join(", ");
    let mut body = format!("struct Results {{\n{fields}}}\nfn element({given}) -> Results {{\n");
    body.push_str(&chain.statements(&Wgsl, |at| format!("a{at}")));
    let of_results: Vec<String> = results.iter().map(|(r, _)| format!("r{r}")).collect();
    let _ = writeln!(body, "    return Results({});\n}}", of_results.join(", "));
    body
}

/// The kernel whose threads have eight elements.
fn lower_by_eight(chain: &Chain<'_>, limits: Limits) -> Lowered {
    let results: Vec<(u32, DType)> = chain.results().collect();
    let mut body = element(chain);
    let _ = writeln!(
        body,
        "fn kernel(group: u32, thread: u32) {{\n    let i = (group * {THREADS}u + thread) * {EIGHT}u;\n    \
         if (i >= p.n) {{ return; }}"
    );
    body.push_str(&coordinates(chain));
    for (at, l) in chain.loaded.iter().enumerate() {
        let get = if chain.axes.is_stretched(at) { "get" } else { "eight" };
        let _ = writeln!(body, "    let x{at} = {get}_p{l}({});", chain.axes.index(at, ""));
    }
    for (e, place) in PLACES.iter().enumerate() {
        let of = |at: usize| if chain.axes.is_stretched(at) { format!("x{at}") } else { format!("x{at}.{place}") };
        let given: Vec<String> = (0..chain.loaded.len()).map(of).collect();
        let _ = writeln!(body, "    let v{e} = element({});", given.join(", "));
    }
    for o in 0..results.len() {
        let four = |first: usize| (0..4).map(|i| format!("v{}.o{o}", first + 2 * i)).collect::<Vec<_>>().join(", ");
        let _ = writeln!(body, "    set_eight_o{o}(i, Eight(vec4<f32>({}), vec4<f32>({})));", four(0), four(1));
    }
    body.push_str("}\n");

    let shader = Shader::new(limits, "elementwise", body, THREADS).with("functions").with("eight");
    let mut shader = shader.number("n", chain.elements);
    for (at, &i) in chain.loaded.iter().enumerate() {
        let (name, dtype) = (format!("p{i}"), chain.dtypes[i]);
        shader = if chain.axes.is_stretched(at) {
            shader.buffer(&name, dtype, At::Operand(i))
        } else {
            shader.by_eight(&name, dtype, At::Operand(i))
        };
    }
    for (o, (_, dtype)) in results.iter().enumerate() {
        shader = shader.by_eight(&format!("o{o}"), *dtype, At::Result(o));
    }
    Ok(Launch::of(vec![shader.line(chain.elements.div_ceil(EIGHT * THREADS))?]))
}

pub(super) fn lower_elementwise(graph: &Graph, node: &Node, op: &Elementwise, limits: Limits) -> Lowered {
    let chain = Chain::of(graph, node, op)?;
    if by_eight(&chain) {
        return lower_by_eight(&chain, limits);
    }
    let bools = chain.results().any(|(_, dtype)| dtype == DType::Bool);
    // A word of bools belongs to one thread.
    let own = if bools { 4 } else { 1 };
    let mut body = String::from("fn element(i: u32) -> Results {\n");
    let mut fields = String::new();
    for (o, (_, dtype)) in chain.results().enumerate() {
        let _ = writeln!(fields, "    o{o}: {},", register(dtype));
    }
    body.insert_str(0, &format!("struct Results {{\n{fields}}}\n"));
    body.push_str(&coordinates(&chain));
    let element = |at: usize| format!("get_p{}({})", chain.loaded[at], chain.axes.index(at, ""));
    body.push_str(&chain.statements(&Wgsl, element));
    let results: Vec<String> = chain.results().map(|(r, _)| format!("r{r}")).collect();
    let _ = writeln!(body, "    return Results({});\n}}", results.join(", "));

    let _ = writeln!(
        body,
        "fn kernel(group: u32, thread: u32) {{\n    let first = (group * {THREADS}u + thread) * {own}u;"
    );
    for (o, _) in chain.results().enumerate().filter(|(_, (_, dtype))| *dtype == DType::Bool) {
        let _ = writeln!(body, "    var word{o} = 0u;");
    }
    let _ =
        writeln!(body, "    for (var i = first; i < min(first + {own}u, p.n); i++) {{\n        let v = element(i);");
    for (o, (_, dtype)) in chain.results().enumerate() {
        let _ = match dtype {
            DType::Bool => writeln!(body, "        word{o} |= v.o{o} << (8u * (i & 3u));"),
            DType::F32 | DType::Bf16 | DType::F16 | DType::I32 | DType::U32 => {
                writeln!(body, "        set_o{o}(i, v.o{o});")
            }
        };
    }
    body.push_str("    }\n");
    for (o, _) in chain.results().enumerate().filter(|(_, (_, dtype))| *dtype == DType::Bool) {
        let _ = writeln!(body, "    if (first < p.n) {{ o{o}[first >> 2u] = word{o}; }}");
    }
    body.push_str("}\n");

    let mut shader = Shader::new(limits, "elementwise", body, THREADS).with("functions").number("n", chain.elements);
    for &i in &chain.loaded {
        shader = shader.buffer(&format!("p{i}"), chain.dtypes[i], At::Operand(i));
    }
    for (o, (_, dtype)) in chain.results().enumerate() {
        shader = shader.buffer(&format!("o{o}"), dtype, At::Result(o));
    }
    Ok(Launch::of(vec![shader.line(chain.elements.div_ceil(own * THREADS))?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_keep_their_bits() {
        let literal = |dtype, value| Wgsl.literal(dtype, value);
        assert_eq!(literal(DType::F32, 0.1), "1e-1f");
        assert_eq!(literal(DType::Bf16, f64::NEG_INFINITY), "from_bits(0xff800000u)");
        assert_eq!(literal(DType::F32, -0.0), "from_bits(0x80000000u)");
        assert_eq!(literal(DType::I32, -1.0), "bitcast<i32>(0xffffffffu)");
        assert_eq!((literal(DType::U32, 4e9), literal(DType::Bool, 1.0)), ("0xee6b2800u".into(), "1u".into()));
    }
}
