//! A product of few rows that runs in the kernel of a product of experts, beside it.

use moebius_ir::{Graph, Node, NodeId};

use super::joined::{self, Joined};
use crate::cuda::launch::{Arg, Joint};
use crate::cuda::source::Source;
use crate::joined::Beside;

/// What the kernel of a product of experts is told of its twin.
pub(super) struct Twin {
    /// The twin's factors, bias and result, its rows, and what its chain has.
    args: Vec<Arg>,
    /// The words for its chain: parameters, and what is made of them.
    words: [String; 2],
    /// Its rows.
    rows: usize,
    /// Whether its own result is stored.
    joint: Joint,
}

impl Twin {
    /// The twin of the product of experts `id`, if the chains behind the two are alike and so are their biases.
    ///
    /// # Errors
    /// Of a chain's dtypes.
    pub(super) fn new(
        graph: &Graph,
        id: NodeId,
        beside: Beside,
        joined: Option<&Joined>,
    ) -> Result<Option<Twin>, String> {
        let Some(twin) = beside.twin else { return Ok(None) };
        let (product, node) = (graph.node(id), graph.node(twin));
        let own = Joined::new(graph, node, beside.behind_twin)?;
        let own = own.as_ref();
        let alike = match (joined, own) {
            (None, None) => true,
            (Some(joined), Some(own)) => joined.is_like(own),
            (None, Some(_)) | (Some(_), None) => false,
        };
        let bias = |node: &Node, i: usize| node.operands.get(i).map(|&v| graph.ty(v).dtype);
        if !alike || bias(product, 3) != bias(node, 2) {
            return Ok(None);
        }
        let first = beside.first(graph, id, twin);
        let bias = if node.operands.len() > 2 { Arg::Operand(2) } else { Arg::Null };
        let rows = graph.ty(node.results[0]).shape.rows();
        let factors = [Arg::Operand(0), Arg::Operand(1), bias, joined::out(own), Arg::I32(rows as i32)];
        let args = factors.into_iter().chain(joined::args(own)).map(|arg| arg.behind(first)).collect();
        let joint = if own.is_some_and(|own| !own.is_kept()) { Joint::Unstored } else { Joint::Stored };
        Ok(Some(Twin { args, words: joined::other_words(own, "twin_"), rows, joint }))
    }

    /// Whether a block has as many rows.
    pub(super) fn fits(&self, most: usize) -> bool {
        self.rows <= most
    }
}

/// The file of products with a twin or none.
pub(super) fn source(twin: Option<&Twin>, source: Source) -> Source {
    let source = source.define("TWIN", u8::from(twin.is_some()));
    match twin {
        None => source,
        Some(Twin { words: [parameters, chain], .. }) => {
            source.define("TWIN_CHAIN_PARAMETERS", parameters).define("TWIN_CHAIN", chain)
        }
    }
}

/// The arguments of `TWIN_PARAMETERS`.
pub(super) fn args(twin: Option<&Twin>) -> Vec<Arg> {
    twin.map_or_else(Vec::new, |twin| twin.args.clone())
}

/// What a launch whose kernel takes it does of it.
pub(super) fn joint(twin: Option<&Twin>) -> Joint {
    twin.map_or(Joint::None, |twin| twin.joint)
}
