//! The combine behind a product of experts of few rows, and the chain behind that, in the product's kernel. combined.cuh has the
//! kernel's side of it.

use moebius_ir::{Graph, NodeId, Op};

use super::int;
use super::joined::{self, Joined};
use crate::cuda::launch::{Arg, Joint, Launch};
use crate::cuda::source::Source;
use crate::joined::{Beside, base};

/// Where the rows beside those of the experts come from, under its name in combined.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// There are none.
    None,
    /// They are in memory before the kernel.
    Before,
    /// The twin makes them.
    OfTwin,
}

/// What the kernel of a product of experts is told of the combine behind it.
pub(super) struct Combined {
    /// The arguments for `COMBINE_PARAMETERS` but the last one, and for those of the chain.
    args: Vec<Arg>,
    chain_args: Vec<Arg>,
    chain: Option<Joined>,
    side: Side,
    /// Whether the kernel is given what the coefficients are the softmax of.
    weighs: bool,
    tokens: usize,
    /// Choices of all tokens.
    choices: usize,
}

impl Combined {
    /// The combine behind the product of experts `id`, which [`Beside`] has looked at.
    ///
    /// # Errors
    /// Of a chain's dtypes, and of sizes that kernels cannot count.
    pub(super) fn new(graph: &Graph, id: NodeId, beside: Beside) -> Result<Option<Combined>, String> {
        let Some(combine) = beside.combined else { return Ok(None) };
        let node = graph.node(combine);
        let Op::Combine(op) = &node.op else { return Ok(None) };
        let first = beside.first(graph, id, combine);
        let behind = |arg: Arg| arg.behind(first);
        let chain = Joined::new(graph, node, beside.behind_combined)?;
        let choice_slot = &graph.ty(node.operands[2]).shape;
        let by_twin = |at: usize| {
            let maker = graph.producer(base(graph, node.operands[at]));
            beside.twin == Some(maker)
        };
        let side = match op.operands()[1] {
            None => Side::None,
            Some(at) if by_twin(at) => Side::OfTwin,
            Some(_) => Side::Before,
        };
        let mut optional = op.operands().map(|i| i.map_or(Arg::Null, |i| behind(Arg::Operand(i))));
        if let Some(softmax) = beside.weighed {
            optional[2] = Arg::Operand(0).behind(beside.first(graph, id, softmax));
        }
        let numbers = [int(choice_slot[0], "tokens")?, int(choice_slot[1], "choices")?].map(Arg::I32);
        let [slots, out] = [Arg::Operand(2), joined::out(chain.as_ref())].map(behind);
        Ok(Some(Combined {
            args: [&[slots][..], &optional, &numbers, &[out]].concat(),
            weighs: beside.weighed.is_some(),
            chain_args: joined::args(chain.as_ref()).into_iter().map(behind).collect(),
            chain,
            side,
            tokens: choice_slot[0],
            choices: choice_slot.elements(),
        }))
    }

    /// The chain behind it.
    pub(super) fn chain(&self) -> Option<&Joined> {
        self.chain.as_ref()
    }
}

/// The file of products with a combine behind them or none; `alone` if a block ends all elements of its columns.
pub(super) fn source(combined: Option<&Combined>, alone: bool, source: Source) -> Source {
    let source = source.define("COMBINES", u8::from(combined.is_some()));
    let Some(combined) = combined else { return source };
    let side = match combined.side {
        Side::None => "NO_SIDE",
        Side::Before => "SIDE_BEFORE",
        Side::OfTwin => "SIDE_OF_TWIN",
    };
    source
        .define("ALONE", u8::from(alone))
        .define("SIDE", side)
        .define("WEIGHS", u8::from(combined.weighs))
        .define("TOKENS", combined.tokens.next_power_of_two())
        .define("CHOICES", combined.choices)
}

/// Where the product's own rows go, which nothing else reads: nowhere if one block has them all.
pub(super) fn out(alone: bool) -> Arg {
    if alone { Arg::Null } else { Arg::Result(0) }
}

/// The arguments of `COMBINE_PARAMETERS` and `CHAIN_PARAMETERS`.
pub(super) fn args(combined: &Combined, alone: bool) -> Vec<Arg> {
    let counters = if alone { Arg::Null } else { Arg::Counters };
    [&combined.args[..], &[counters], &combined.chain_args].concat()
}

/// A launch whose kernel does the work of the combine too, over so many tiles of columns.
pub(super) fn with(combined: &Combined, alone: bool, tiles: usize, mut launch: Launch) -> Launch {
    launch.combined = if alone { Joint::Unstored } else { Joint::Stored };
    launch.behind_combined = joined::joint(combined.chain());
    launch.counters = if alone { 0 } else { tiles };
    launch
}
