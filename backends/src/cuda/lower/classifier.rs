//! Launches of the losses of a linear classifier: cross entropy and distillation.

use moebius_ir::{DType, Graph, Node};

use super::gemm::{Kernels, Product, TILE, plain, products, stored};
use super::hopper::{self, End, Segments};
use super::{Lowered, dtype, int, shapes};
use crate::cuda::chip::Chip;
use crate::cuda::launch::{Action, Arg, Launch, Scratch, kernel};

const CROSS_ENTROPY: &str = include_str!("../kernels/cross_entropy.cu");
const DISTILLATION: &str = include_str!("../kernels/distillation.cu");
/// Bytes of the cotangents of logits that a gradient holds at a time: enough for products that fill a GPU.
const CHUNK_BYTES: usize = 256 << 20;

/// Extents of a linear classifier.
struct Classes {
    n: usize,
    d: usize,
    classes: usize,
    tiles: usize,
}

impl Classes {
    fn of(graph: &Graph, node: &Node) -> Classes {
        let [x, w] = shapes(graph, node);
        Classes { n: x[0], d: x[1], classes: w[0], tiles: w[0].div_ceil(TILE) }
    }

    /// The struct `Classes` of the kernels.
    fn arg(&self) -> Result<Arg, String> {
        let mut bytes = Vec::with_capacity(16);
        for n in [self.n, self.d, self.classes, self.tiles] {
            bytes.extend(int(n, "an extent of a product")?.to_le_bytes());
        }
        Ok(Arg::Bytes(bytes))
    }

    /// A block for each tile of logits of `width` classes.
    fn grid(&self, width: usize) -> [usize; 3] {
        [width.div_ceil(TILE), self.n.div_ceil(TILE), 1]
    }

    /// A warp for each row, in blocks of four.
    fn by_row(&self) -> [usize; 3] {
        [self.n.div_ceil(4), 1, 1]
    }

    fn rejected(&self, launch: Launch) -> Launch {
        launch.rejecting(format!("targets below {}, the classes", self.classes), "a target of")
    }
}

fn operands<const N: usize>() -> [Arg; N] {
    std::array::from_fn(Arg::Operand)
}

pub(super) fn lower_linear_cross_entropy(graph: &Graph, node: &Node, chip: Chip) -> Lowered {
    let s = Classes::of(graph, node);
    let Kernels { source, threads, .. } = products("cross_entropy.cu", CROSS_ENTROPY, dtype(graph, node, 0), TILE)?;
    let mut scratch = Scratch::default();
    let [largest, sum] = std::array::from_fn(|_| scratch.take(4 * s.n * s.tiles));
    let of_target = scratch.take(4 * s.n);
    let found = [largest, sum, of_target];
    let product = Product::of(stored(s.d, false), stored(s.d, true), s.n, s.classes, s.d);
    let end = [&[Arg::Operand(2)][..], &found, &[Arg::I32(int(s.tiles, "tiles of classes")?)]].concat();
    let own = [&Arg::Operand(0), &Arg::Operand(1), &Arg::Null];
    let end = End::cross_entropy_tiles(end);
    let of_tiles = match hopper::action(chip, dtype(graph, node, 0), &product, Segments::None, own, end)? {
        Some(action) => action,
        None => {
            let args = [&operands::<3>()[..], &found, &[s.arg()?]].concat();
            kernel(source.clone(), "cross_entropy_tiles", s.grid(s.classes), threads, args)
        }
    };
    let ends = [Arg::Operand(2), Arg::Result(0), Arg::Result(1), s.arg()?, Arg::Fault, Arg::Step];
    let rows = [&found[..], &ends].concat();
    let actions = vec![of_tiles, kernel(source, "cross_entropy_rows", s.by_row(), 128, rows)];
    Ok(s.rejected(Launch::of(actions).with_scratch(scratch.bytes())))
}

pub(super) fn lower_linear_cross_entropy_grad(graph: &Graph, node: &Node, chip: Chip) -> Lowered {
    let ty = dtype(graph, node, 0);
    let of = products("cross_entropy.cu", CROSS_ENTROPY, ty, TILE)?;
    gradients(graph, node, chip, |s, chunk| {
        let sizes = [Arg::I32(int(chunk.first, "classes")?), Arg::I32(int(s.classes, "classes")?)];
        let ends = [&sizes[..], &[Arg::Fault, Arg::Step]].concat();
        let own = [&[2, 3, 4].map(Arg::Operand)[..], std::slice::from_ref(&chunk.c), &ends].concat();
        let logits = Product::of(stored(s.d, false), stored(s.d, true), s.n, chunk.width, s.d);
        let factors = [&Arg::Operand(0), &chunk.w, &Arg::Null];
        match hopper::action(chip, ty, &logits, Segments::None, factors, End::cross_entropy_grad(own))? {
            Some(action) => Ok(action),
            None => chunk.kernel(s, &of, "cross_entropy_grad", &operands::<5>(), &[]),
        }
    })
}

/// Some classes, whose cotangents a gradient holds at a time.
struct Chunk {
    /// The first class.
    first: usize,
    /// How many.
    width: usize,
    /// Where their cotangents go, `[n, width]`.
    c: Arg,
    /// Their rows of w.
    w: Arg,
}

impl Chunk {
    /// The kernel `name`, which makes the cotangents: it is given `operands`, where they go, the first class and their number,
    /// `Classes`, and `more`.
    fn kernel(
        &self,
        s: &Classes,
        of: &Kernels,
        name: &'static str,
        operands: &[Arg],
        more: &[Arg],
    ) -> Result<Action, String> {
        let sizes = [Arg::I32(int(self.first, "classes")?), Arg::I32(int(self.width, "classes")?), s.arg()?];
        let args = [operands, std::slice::from_ref(&self.c), &sizes, more, &[Arg::Fault, Arg::Step]].concat();
        Ok(kernel(of.source.clone(), name, s.grid(self.width), of.threads, args))
    }
}

/// The gradients of x and w from the cotangents of the logits, which the action of `cotangents` makes for each chunk of classes.
fn gradients(
    graph: &Graph,
    node: &Node,
    chip: Chip,
    cotangents: impl Fn(&Classes, &Chunk) -> Result<Action, String>,
) -> Lowered {
    let s = Classes::of(graph, node);
    let ty = dtype(graph, node, 0);
    let most = chunk_of_classes(s.n, s.classes, ty.bytes());
    let chunks = s.classes.div_ceil(most);
    let mut scratch = Scratch::default();
    let c = scratch.take(ty.bytes() * s.n * most);
    // dx of several chunks is added up in f32: in place where dx is f32.
    let sum = match (chunks > 1, ty == DType::F32) {
        (false, _) => Arg::Null,
        (true, true) => Arg::Result(0),
        (true, false) => scratch.take(4 * s.n * s.d),
    };
    let mut actions = Vec::with_capacity(3 * chunks);
    for i in 0..chunks {
        let first = i * most;
        let width = most.min(s.classes - first);
        // The rows of w, and of dw, that belong to the chunk.
        let bytes = first * s.d * ty.bytes();
        let chunk = Chunk { first, width, c: c.clone(), w: Arg::OperandAt(1, bytes) };
        actions.push(cotangents(&s, &chunk)?);
        let of_w = Product::of(stored(width, true), stored(s.d, false), width, s.d, s.n);
        let to = Arg::ResultAt(1, bytes);
        actions.push(plain(chip, ty, &of_w, [&c, &Arg::Operand(0)], [&Arg::Null, &Arg::Null, &to])?);
        let of_x = Product::of(stored(width, false), stored(s.d, false), s.n, s.d, width);
        let add = if i == 0 { Arg::Null } else { sum.clone() };
        let to = if i + 1 == chunks { Arg::Null } else { sum.clone() };
        actions.push(plain(chip, ty, &of_x, [&c, &chunk.w], [&add, &to, &Arg::Result(0)])?);
    }
    Ok(s.rejected(Launch::of(actions).with_scratch(scratch.bytes())))
}

/// How many classes the gradient takes at a time: a multiple of a tile, and all of them where they fit.
fn chunk_of_classes(n: usize, classes: usize, element: usize) -> usize {
    let fit = CHUNK_BYTES / (n.max(1) * element) / TILE * TILE;
    fit.clamp(TILE, classes.max(TILE)).min(classes)
}

/// The kernels of distillation for the dtype and temperature of a node.
fn distillation(graph: &Graph, node: &Node, temperature: f32) -> Result<Kernels, String> {
    let mut of = products("distillation.cu", DISTILLATION, dtype(graph, node, 0), TILE)?;
    of.source = of.source.define("SOFT", u8::from(temperature != 1.0));
    Ok(of)
}

/// Pairs of sums of each tile: of the student, of the student at T where that is another one, and `more`.
fn sums(s: &Classes, temperature: f32, arrays: [usize; 2], scratch: &mut Scratch) -> Arg {
    let [hard, soft] = arrays;
    scratch.take(4 * s.n * s.tiles * if temperature == 1.0 { hard } else { soft })
}

pub(super) fn lower_linear_distillation(graph: &Graph, node: &Node, temperature: f32) -> Lowered {
    let s = Classes::of(graph, node);
    let Kernels { source, threads, .. } = distillation(graph, node, temperature)?;
    let width = int(graph.shape(node.operands[3])[1], "a width")?;
    let mut scratch = Scratch::default();
    let found = [sums(&s, temperature, [5, 7], &mut scratch), scratch.take(4 * s.n)];
    let tiles = [&operands::<5>()[..], &found, &[s.arg()?, Arg::I32(width), Arg::F32(1.0 / temperature)]].concat();
    let results: [Arg; 5] = std::array::from_fn(Arg::Result);
    let ends = [s.arg()?, Arg::F32(temperature), Arg::Fault, Arg::Step];
    let rows = [&found[..], &[Arg::Operand(2)], &results, &ends].concat();
    let actions = vec![
        kernel(source.clone(), "distillation_tiles", s.grid(s.classes), threads, tiles),
        kernel(source, "distillation_rows", s.by_row(), 128, rows),
    ];
    Ok(s.rejected(Launch::of(actions).with_scratch(scratch.bytes())))
}

pub(super) fn lower_linear_distillation_grad(graph: &Graph, node: &Node, temperature: f32, chip: Chip) -> Lowered {
    let of = distillation(graph, node, temperature)?;
    let width = int(graph.shape(node.operands[3])[1], "a width")?;
    let more = [Arg::I32(width), Arg::F32(temperature), Arg::F32(1.0 / temperature)];
    gradients(graph, node, chip, |s, chunk| chunk.kernel(s, &of, "distillation_grad", &operands::<10>(), &more))
}

pub(super) fn lower_linear_distillation_cached(graph: &Graph, node: &Node, temperature: f32) -> Lowered {
    let s = Classes::of(graph, node);
    let Kernels { source, threads, .. } = distillation(graph, node, temperature)?;
    let kept = graph.shape(node.operands[3])[1];
    let count = Arg::I32(int(kept, "kept tokens")?);
    let mut scratch = Scratch::default();
    let found = [sums(&s, temperature, [2, 4], &mut scratch), scratch.take(4 * s.n * kept), scratch.take(4 * s.n)];
    let ends = [s.arg()?, count.clone(), Arg::F32(1.0 / temperature), Arg::Fault, Arg::Step];
    let tiles = [&operands::<4>()[..], &found, &ends].concat();
    let results: [Arg; 5] = std::array::from_fn(Arg::Result);
    let ends = [s.arg()?, count, Arg::F32(temperature), Arg::Fault, Arg::Step];
    let rows = [&found[..], &[2, 4, 5].map(Arg::Operand), &results, &ends].concat();
    let actions = vec![
        kernel(source.clone(), "kept_tiles", s.grid(s.classes), threads, tiles),
        kernel(source, "kept_rows", s.by_row(), 128, rows),
    ];
    Ok(s.rejected(Launch::of(actions).with_scratch(scratch.bytes())))
}

pub(super) fn lower_linear_distillation_cached_grad(
    graph: &Graph,
    node: &Node,
    temperature: f32,
    chip: Chip,
) -> Lowered {
    let of = distillation(graph, node, temperature)?;
    let kept = int(graph.shape(node.operands[3])[1], "kept tokens")?;
    let more = [Arg::I32(kept), Arg::F32(temperature), Arg::F32(1.0 / temperature)];
    gradients(graph, node, chip, |s, chunk| chunk.kernel(s, &of, "kept_grad", &operands::<11>(), &more))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_classes_fit_and_cover() {
        assert_eq!(chunk_of_classes(9, 517, 4), 517);
        assert_eq!(chunk_of_classes(16_384, 50_257, 2), 8192);
        // Many rows: one tile at a time, however much that is.
        assert_eq!(chunk_of_classes(1 << 22, 300, 4), 64);
        assert_eq!(chunk_of_classes(0, 3, 4), 3);
    }
}
