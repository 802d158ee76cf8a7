//! Chains that are joined onto a product: the text by which its kernel does their work on each element that it has.

use std::fmt::Write;

use moebius_ir::{Graph, Node, NodeId, Op};

use super::elementwise::{Cpp, coordinates, stored};
use super::float;
use crate::chain::Chain;
use crate::cuda::launch::{Arg, Joint, Launch};
use crate::cuda::source::{Header, Source};
use crate::joined::{base, is_kept};

const CHAIN: &str = include_str!("../kernels/chain.cuh");

/// A chain for the kernel of the product before it.
pub(super) struct Joined {
    /// `CHAIN_PARAMETERS`, `CHAIN`, `KEPT` and `Chain`, as `chain.cuh` wants them.
    text: String,
    /// The types and names of `CHAIN_PARAMETERS`.
    parameters: Vec<(String, String)>,
    /// The arguments for them.
    pub(super) args: Vec<Arg>,
    /// Whether the product is read by others too.
    kept: bool,
    /// Whether eight elements of a row, from a multiple of eight on, may be taken together.
    pub(super) eights: bool,
    /// Whether it reads nothing but the product.
    pub(super) alone: bool,
}

impl Joined {
    /// The chain of node `chain` behind `node`, if there is one and it can be joined onto a product whose result is a float.
    ///
    /// # Errors
    /// What is wanted instead of the chain's dtypes.
    pub(super) fn new(graph: &Graph, node: &Node, chain: Option<NodeId>) -> Result<Option<Joined>, String> {
        let Some(chain) = chain else { return Ok(None) };
        let (product, after) = (node.results[0], graph.node(chain));
        let Op::Elementwise(op) = &after.op else { return Ok(None) };
        let Ok(own) = float(graph.ty(product).dtype) else { return Ok(None) };
        let chain_of = Chain::of(graph, after, op)?;
        let (loaded, axes, dtypes) = (&chain_of.loaded, &chain_of.axes, &chain_of.dtypes);
        // Places in `loaded` of the operands that are not the product, and those operands' number.
        let read = || loaded.iter().enumerate().filter(|(_, i)| base(graph, after.operands[**i]) != product);
        let (mut parameters, mut fields) = (Vec::new(), String::new());
        let (mut args, mut held, mut loads) = (Vec::new(), String::new(), String::new());
        for (at, &i) in read() {
            let (kind, index) = (stored(dtypes[i]), axes.index(at, "(i64)"));
            let _ = writeln!(fields, "    const {kind}* p{i};");
            parameters.push((format!("const {kind}*"), format!("p{i}")));
            args.push(Arg::Operand(node.operands.len() + i));
            if axes.is_stretched(at) {
                let _ = writeln!(held, "        {kind} v{i};");
                let _ = writeln!(loads, "        l.v{i} = p{i}[{index}];");
            } else {
                let _ = writeln!(held, "        Vector<{kind}, COUNT> v{i};");
                let _ = writeln!(loads, "        l.v{i} = load_vector<COUNT>(p{i} + {index});");
            }
        }
        let statements = chain_of.statements(&Cpp, |at| {
            let i = loaded[at];
            let element = match (base(graph, after.operands[i]) == product, axes.is_stretched(at)) {
                (true, _) => "product.at[j]".to_owned(),
                (false, true) => format!("l.v{i}"),
                (false, false) => format!("l.v{i}.at[j]"),
            };
            if dtypes[i].is_float() { format!("to_float({element})") } else { element }
        });
        let (mut results, mut rounded, mut stores) = (String::new(), String::new(), String::new());
        for (o, (r, dtype)) in chain_of.results().enumerate() {
            let kind = stored(dtype);
            let _ = writeln!(fields, "    {kind}* o{o};");
            parameters.push((format!("{kind}*"), format!("o{o}")));
            args.push(Arg::Result(node.results.len() + o));
            let value = if dtype.is_float() { format!("narrowed<{kind}>(r{r})") } else { format!("r{r}") };
            let _ = writeln!(results, "        Vector<{kind}, COUNT> w{o};");
            let _ = writeln!(rounded, "            w{o}.at[j] = {value};");
            let _ = writeln!(stores, "        store_vector<COUNT>(o{o} + i, w{o});");
        }
        let (kept, alone) = (is_kept(graph, product, chain), read().next().is_none());
        let coordinates = coordinates(&chain_of);
        let [given, made] = words(&parameters, "");
        let text = format!(
            "#define CHAIN_PARAMETERS {given}\n#define CHAIN {made}\n#define KEPT {}\n\
             /// The chain behind the product, from element `i` on.\nstruct Chain {{\n{fields}\
             \x20   template <int COUNT> struct Loaded {{\n{held}    }};\n\
             \x20   /// What it reads beside the product.\n\
             \x20   template <int COUNT> __device__ __forceinline__ Loaded<COUNT> load(i64 i) const {{\n\
             \x20       Loaded<COUNT> l;\n{coordinates}{loads}        return l;\n    }}\n\
             \x20   /// Its work.\n\
             \x20   template <int COUNT>\n\
             \x20   __device__ __forceinline__ void end(i64 i, const Loaded<COUNT>& l, const Vector<{own}, COUNT>& product) const {{\n\
             {results}#pragma unroll\n        for (int j = 0; j < COUNT; j++) {{\n{statements}{rounded}        }}\n{stores}    }}\n}};\n",
            u8::from(kept),
        );
        Ok(Some(Joined { text, parameters, args, kept, eights: axes.together(8), alone }))
    }

    /// Whether the chain of another product is done by the same text.
    pub(super) fn is_like(&self, other: &Joined) -> bool {
        self.text == other.text
    }

    /// Whether the product is read by others too.
    pub(super) fn is_kept(&self) -> bool {
        self.kept
    }

    /// Where the product's own result goes: nowhere if nothing but the chain reads it.
    fn out(&self) -> Arg {
        if self.kept { Arg::Result(0) } else { Arg::Null }
    }
}

/// Parameters of a kernel with names behind `prefix`, and the chain that is made of them.
fn words(parameters: &[(String, String)], prefix: &str) -> [String; 2] {
    let given = parameters.iter().map(|(kind, name)| format!(", {kind} {prefix}{name}")).collect();
    let names: Vec<String> = parameters.iter().map(|(_, name)| format!("{prefix}{name}")).collect();
    [given, format!("Chain{{{}}}", names.join(", "))]
}

/// The words for parameters and chain of another product of the same kernel, or for none.
pub(super) fn other_words(joined: Option<&Joined>, prefix: &str) -> [String; 2] {
    joined.map_or_else(|| [String::new(), "Chain()".into()], |joined| words(&joined.parameters, prefix))
}

/// Where a product's own result goes.
pub(super) fn out(joined: Option<&Joined>) -> Arg {
    joined.map_or(Arg::Result(0), Joined::out)
}

/// The arguments of `CHAIN_PARAMETERS`.
pub(super) fn args(joined: Option<&Joined>) -> Vec<Arg> {
    joined.map_or_else(Vec::new, |joined| joined.args.clone())
}

/// A file of products that gives each element to `put`, with a chain or none. The headers are to have `FUNCTIONS` and `VECTORS`.
pub(super) fn source(joined: Option<&Joined>, file: &'static str, headers: &'static [Header], text: &str) -> Source {
    let chain = joined.map_or("", |joined| &joined.text);
    let text = format!("{chain}#line 1 \"chain.cuh\"\n{CHAIN}\n#line 1 \"{file}\"\n{text}");
    let source = Source::generated(file, headers, text).define("JOINED", u8::from(joined.is_some()));
    // As in a kernel of the chain's own: the bits of a result do not depend on where it is computed.
    if joined.is_some() { source.exact() } else { source }
}

/// A launch whose kernels do the work of the chain too.
pub(super) fn with(joined: Option<&Joined>, mut launch: Launch) -> Launch {
    launch.behind = joint(joined);
    launch
}

/// What a launch whose kernels take it does of it.
pub(super) fn joint(joined: Option<&Joined>) -> Joint {
    match joined {
        None => Joint::None,
        Some(Joined { kept: true, .. }) => Joint::Stored,
        Some(Joined { kept: false, .. }) => Joint::Unstored,
    }
}
