//! Launches of the losses of a linear classifier: cross entropy and distillation.

use moebius_ir::{DType, Graph, Node};

use super::gemm::{Places, Product, SMALL_TILE, gemm, stored, tile, tiled};
use super::{Lowered, dtype};
use crate::lowering::shapes;
use crate::vulkan::launch::{Action, At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// Bytes of the cotangents of logits that a gradient holds at a time.
const CHUNK_BYTES: usize = 64 << 20;
/// Classes of a chunk are a multiple of this, as of every tile.
const STEP: usize = 64;
/// Threads that join the tiles of a row.
const ROW_THREADS: usize = 64;

/// A linear classifier of n rows of d elements.
struct Classes<'a> {
    graph: &'a Graph,
    node: &'a Node,
    limits: Limits,
    n: usize,
    d: usize,
    classes: usize,
    tile: usize,
}

impl Classes<'_> {
    fn of<'a>(graph: &'a Graph, node: &'a Node, tile: usize, limits: Limits) -> Classes<'a> {
        let [x, w] = shapes(graph, node);
        Classes { graph, node, limits, n: x[0], d: x[1], classes: w[0], tile }
    }

    fn tiles(&self) -> usize {
        self.classes.div_ceil(self.tile)
    }

    /// A kernel on tiles of logits, with x, w and the labels.
    fn tiled(&self, name: &'static str) -> Shader {
        tiled(self.limits, name, [self.tile; 2], [true, true])
            .rejecting()
            .number("n", self.n)
            .number("d", self.d)
            .number("classes", self.classes)
            .number("tiles", self.tiles())
            .buffer("x", self.dtype(0), At::Operand(0))
            .buffer("w", self.dtype(1), At::Operand(1))
            .buffer("labels", DType::I32, At::Operand(2))
    }

    /// A kernel on rows, with the labels.
    fn rows(&self, name: &'static str) -> Shader {
        Shader::file(self.limits, name, ROW_THREADS)
            .sums()
            .rejecting()
            .number("n", self.n)
            .number("classes", self.classes)
            .number("tiles", self.tiles())
            .buffer("labels", DType::I32, At::Operand(2))
    }

    /// A workgroup for each tile of logits of `width` classes.
    fn grid(&self, width: usize) -> [usize; 3] {
        [width.div_ceil(self.tile), self.n.div_ceil(self.tile), 1]
    }

    fn dtype(&self, i: usize) -> DType {
        dtype(self.graph, self.node, i)
    }

    fn rejected(&self, launch: Launch) -> Launch {
        launch.rejecting(format!("targets below {}, the classes", self.classes), "a target of")
    }
}

/// Buffers of f32 by name.
fn floats(shader: Shader, buffers: &[(&str, At)]) -> Shader {
    buffers.iter().fold(shader, |shader, &(name, at)| shader.buffer(name, DType::F32, at))
}

pub(super) fn lower_linear_cross_entropy(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let s = Classes::of(graph, node, tile(limits), limits);
    let mut scratch = Scratch::default();
    let [largest, total] = std::array::from_fn(|_| scratch.take(4 * s.n * s.tiles()));
    let found = [("largest", largest), ("total", total), ("of_label", scratch.take(4 * s.n))];
    let of_rows = floats(s.rows("cross_entropy_rows"), &found);
    let actions = vec![
        floats(s.tiled("cross_entropy_tiles").with("logits"), &found).grid(s.grid(s.classes))?,
        floats(of_rows, &[("loss", At::Result(0)), ("lse", At::Result(1))]).line(s.n)?,
    ];
    Ok(s.rejected(Launch::of(actions).with_scratch(&scratch)))
}

pub(super) fn lower_linear_cross_entropy_grad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let s = Classes::of(graph, node, tile(limits), limits);
    gradients(&s, || floats(s.tiled("cross_entropy_grad"), &[("lse", At::Operand(3)), ("dloss", At::Operand(4))]))
}

/// The gradients of x and w from the cotangents of the logits, which the kernel `cotangents` makes for each chunk of classes.
fn gradients(s: &Classes<'_>, cotangents: impl Fn() -> Shader) -> Lowered {
    let ty = s.dtype(0);
    let most = chunk_of_classes(s.n, s.classes, ty.bytes());
    let chunks = s.classes.div_ceil(most);
    let mut scratch = Scratch::default();
    let c = scratch.take(ty.bytes() * s.n * most);
    // dx of several chunks is added up in f32: in place where dx is f32.
    let sum = match (chunks > 1, ty == DType::F32) {
        (false, _) => At::Null,
        (true, true) => At::Result(0),
        (true, false) => scratch.take(4 * s.n * s.d),
    };
    let mut actions: Vec<Action> = Vec::with_capacity(3 * chunks);
    let none = (At::Null, DType::F32);
    for i in 0..chunks {
        let first = i * most;
        let width = most.min(s.classes - first);
        let shader = cotangents().number("class0", first).number("width", width).buffer("c", ty, c);
        actions.push(shader.grid(s.grid(width))?);
        // The rows of dw, and of w, that belong to the chunk.
        let of_w = Product::of(stored(width, true), stored(s.d, false), width, s.d, s.n);
        let of_w = Product { c_at: first * s.d, ..of_w };
        let places = Places {
            a: c,
            b: At::Operand(0),
            bias: none,
            add: At::Null,
            c: At::Result(1),
            joined: None,
            lead: None,
            routed: None,
        };
        actions.push(gemm(s.limits, [ty; 3], &of_w, &places)?);
        let of_x = Product::of(stored(width, false), stored(s.d, false), s.n, s.d, width);
        let of_x = Product { b_at: first * s.d, ..of_x };
        let add = if i == 0 { At::Null } else { sum };
        let (to, of_to) = if i + 1 == chunks { (At::Result(0), ty) } else { (sum, DType::F32) };
        let places = Places { a: c, b: At::Operand(1), bias: none, add, c: to, joined: None, lead: None, routed: None };
        actions.push(gemm(s.limits, [ty, ty, of_to], &of_x, &places)?);
    }
    Ok(s.rejected(Launch::of(actions).with_scratch(&scratch)))
}

/// How many classes the gradient takes at a time: a multiple of a tile, and all of them where they fit.
fn chunk_of_classes(n: usize, classes: usize, element: usize) -> usize {
    let fit = CHUNK_BYTES / (n.max(1) * element) / STEP * STEP;
    fit.clamp(STEP, classes.max(STEP)).min(classes).max(1)
}

/// Pairs of sums of each tile: of the student, of the student at T where that is another one, and `more`.
fn sums(s: &Classes<'_>, temperature: f32, arrays: [usize; 2], scratch: &mut Scratch) -> At {
    let [hard, soft] = arrays;
    scratch.take(4 * s.n * s.tiles() * if temperature == 1.0 { hard } else { soft })
}

fn results(names: [&'static str; 5]) -> [(&'static str, At); 5] {
    std::array::from_fn(|i| (names[i], At::Result(i)))
}

/// The teacher's x and w, operands 3 and 4.
fn teacher(s: &Classes<'_>, shader: Shader) -> Shader {
    let shader = shader.buffer("teacher_x", s.dtype(3), At::Operand(3));
    shader.buffer("teacher_w", s.dtype(4), At::Operand(4))
}

pub(super) fn lower_linear_distillation(graph: &Graph, node: &Node, temperature: f32, limits: Limits) -> Lowered {
    let s = Classes::of(graph, node, SMALL_TILE, limits);
    let mut scratch = Scratch::default();
    let parts = sums(&s, temperature, [5, 7], &mut scratch);
    let found = [("parts", parts), ("of_label", scratch.take(4 * s.n))];
    let soft = temperature != 1.0;
    let of_tiles = teacher(&s, s.tiled("distillation_tiles").with("tile_sums").flag("SOFT", soft))
        .number("width", graph.shape(node.operands[3])[1])
        .float("colder", 1.0 / temperature);
    let of_rows = floats(s.rows("distillation_rows").with("row_sums").flag("SOFT", soft), &found);
    let results = results(["loss", "kd", "lse", "soft_lse", "teacher_lse"]);
    let actions = vec![
        floats(of_tiles, &found).grid(s.grid(s.classes))?,
        floats(of_rows.float("temperature", temperature), &results).line(s.n)?,
    ];
    Ok(s.rejected(Launch::of(actions).with_scratch(&scratch)))
}

pub(super) fn lower_linear_distillation_grad(graph: &Graph, node: &Node, temperature: f32, limits: Limits) -> Lowered {
    let s = Classes::of(graph, node, tile(limits), limits);
    let operands = ["lse", "soft_lse", "teacher_lse", "dloss", "dkd"];
    gradients(&s, || {
        let shader = teacher(&s, s.tiled("distillation_grad").flag("SOFT", temperature != 1.0))
            .number("teacher_d", graph.shape(node.operands[3])[1])
            .float("temperature", temperature)
            .float("colder", 1.0 / temperature);
        operands
            .iter()
            .enumerate()
            .fold(shader, |shader, (i, name)| shader.buffer(name, DType::F32, At::Operand(5 + i)))
    })
}

pub(super) fn lower_linear_distillation_cached(
    graph: &Graph,
    node: &Node,
    temperature: f32,
    limits: Limits,
) -> Lowered {
    let s = Classes::of(graph, node, SMALL_TILE, limits);
    let kept = graph.shape(node.operands[3])[1];
    let mut scratch = Scratch::default();
    let parts = sums(&s, temperature, [2, 4], &mut scratch);
    let kept_logits = scratch.take(4 * s.n * kept);
    let found = [("parts", parts), ("kept_logits", kept_logits), ("of_label", scratch.take(4 * s.n))];
    let soft = temperature != 1.0;
    let of_tiles = s
        .tiled("kept_tiles")
        .with("logits")
        .with("tile_sums")
        .flag("SOFT", soft)
        .number("kept", kept)
        .float("colder", 1.0 / temperature)
        .buffer("ids", DType::I32, At::Operand(3));
    let of_rows = s.rows("kept_rows").with("row_sums").flag("SOFT", soft).number("kept", kept);
    let of_rows = of_rows.float("temperature", temperature).buffer("log_p", s.dtype(4), At::Operand(4)).buffer(
        "log_tail",
        s.dtype(5),
        At::Operand(5),
    );
    let results = results(["loss", "kd", "lse", "soft_lse", "tail_lse"]);
    let actions =
        vec![floats(of_tiles, &found).grid(s.grid(s.classes))?, floats(floats(of_rows, &found), &results).line(s.n)?];
    Ok(s.rejected(Launch::of(actions).with_scratch(&scratch)))
}

pub(super) fn lower_linear_distillation_cached_grad(
    graph: &Graph,
    node: &Node,
    temperature: f32,
    limits: Limits,
) -> Lowered {
    let s = Classes::of(graph, node, SMALL_TILE, limits);
    let operands = ["log_p", "log_tail", "lse", "soft_lse", "tail_lse", "dloss", "dkd"];
    gradients(&s, || {
        let shader = s
            .tiled("kept_grad")
            .flag("SOFT", temperature != 1.0)
            .number("kept", graph.shape(node.operands[3])[1])
            .float("temperature", temperature)
            .float("colder", 1.0 / temperature)
            .buffer("ids", DType::I32, At::Operand(3));
        operands
            .iter()
            .enumerate()
            .fold(shader, |shader, (i, name)| shader.buffer(name, s.dtype(4 + i), At::Operand(4 + i)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_classes_fit_and_cover() {
        assert_eq!(chunk_of_classes(9, 517, 4), 517);
        assert_eq!(chunk_of_classes(4096, 50_257, 4), 4096);
        // Many rows: one tile at a time, however much that is.
        assert_eq!(chunk_of_classes(1 << 22, 300, 4), 64);
        assert_eq!(chunk_of_classes(0, 3, 4), 3);
    }
}
