//! Launches of everything that is a matrix product: matmul and the expert matmuls.
//!
//! A kernel says in its file which product a workgroup has. Its tile is computed by `gemm_plain.wgsl`, on cooperative matrices, where the
//! device has them and [`cooperative::tile`] says so, if it has few rows, by [`few_rows`] or `gemm_few_rows.wgsl`, or, if it has few
//! columns, by [`narrow`]. The sums of a matmul with few tiles are cut into [`parts`].

use moebius_ir::ops::{ExpertMatmul, Matmul};
use moebius_ir::{DType, Graph, Node, Shape};

use super::combined::Combined;
use super::cooperative::Tile;
use super::few_rows::Few;
use super::joined::{self, Joined};
use super::lead::Lead;
use super::parts::{self, Parts};
use super::routed::Routed;
use super::{Around, Lowered, cooperative, dtype, narrow};
use crate::lowering::shapes;
use crate::vulkan::launch::{Action, At, Launch, Scratch};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// Rows and columns of the tile of a workgroup: the large one reads each element half as often.
const TILE: usize = 64;
/// That of kernels that keep two tiles more in memory, and of processors.
pub(super) const SMALL_TILE: usize = 32;
/// Its threads: 16 x 16.
pub(super) const THREADS: usize = 256;
/// The most rows for which reading the other matrix is the work.
pub(super) const MOST_FEW: usize = 8;
/// Workgroups that keep a large GPU busy, and the least elements of k of one: of plain tiles, of cooperative ones, of few rows.
const ENOUGH: [usize; 3] = [528, 132, 64];
const LEAST: [usize; 2] = [256, 512];
/// The most experts of one product: their tiles are counted in the memory of a workgroup.
const MOST_EXPERTS: usize = 1024;

/// The tile on such a device.
pub(super) fn tile(limits: Limits) -> usize {
    if limits.processor { SMALL_TILE } else { TILE }
}

/// A kernel that computes tiles of products; whether neighbours along k lie together in the left and in the right matrix.
pub(super) fn tiled(limits: Limits, name: &'static str, [rows, columns]: [usize; 2], along_k: [bool; 2]) -> Shader {
    let shader = Shader::file(limits, name, THREADS).with("gemm_tile");
    let shader = shader.constant("TILE", rows).constant("TILE_WIDTH", columns);
    shader.flag("LEFT_ALONG_K", along_k[0]).flag("RIGHT_ALONG_K", along_k[1])
}

/// The kernel that is nothing but a product of few rows.
const PRODUCT_ALONE: &str = "fn kernel(group: vec3<u32>, thread: u32) { product(group, thread); }";
/// The logits are what it leaves.
const LOGITS: &str = "fn get_logits(nth: u32) -> f32 { return get_c(nth); }";

/// How a tile is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Every product by itself, in tiles of so many rows and columns.
    Plain([usize; 2]),
    /// So many rows, at most [`MOST_FEW`], element by element.
    FewRows(usize),
    /// Few rows, by loads of eight elements.
    Eights(Few),
    /// Few columns, by loads of eight elements.
    Narrow,
    /// On cooperative matrices, with such tiles.
    Cooperative(Tile),
}

impl Way {
    /// That of a product, which has so many tiles.
    fn of(limits: Limits, types: [DType; 2], p: &Product, tiles: impl Fn(usize, usize) -> usize) -> Way {
        if let Some(tile) = cooperative::tile(limits, types, p, p.m, tiles) {
            return Way::Cooperative(tile);
        }
        if p.m > MOST_FEW && narrow::fits(p) {
            return Way::Narrow;
        }
        if p.m > MOST_FEW {
            return Way::plain(limits, p.m, p.n);
        }
        Few::of(limits, p, p.m, p.batch).map_or(Way::FewRows(p.m.max(1)), Way::Eights)
    }

    /// Plain tiles, which are narrow where the product is.
    fn plain(limits: Limits, rows: usize, columns: usize) -> Way {
        let side = |extent| if extent <= SMALL_TILE { SMALL_TILE } else { tile(limits) };
        Way::Plain([side(rows), side(columns)])
    }

    /// Rows and columns of a workgroup.
    fn tile(&self, along_k: bool) -> [usize; 2] {
        match self {
            Way::Plain(tile) => *tile,
            // A thread's neighbours read what lies together: 32 elements.
            Way::FewRows(rows) => [*rows, if along_k { THREADS / 32 } else { 32 }],
            Way::Eights(few) => [few.rows, few.columns()],
            Way::Narrow => narrow::TILE,
            Way::Cooperative(tile) => [tile.rows, tile.columns],
        }
    }

    /// How the sums of a product of so many tiles are cut.
    fn parts(&self, tiles: usize, k: usize) -> Parts {
        match self {
            Way::Plain(_) => Parts::of(tiles, k, LEAST[0], ENOUGH[0]),
            Way::Narrow => Parts::of(tiles, k, LEAST[0], ENOUGH[0] / 2),
            Way::Cooperative(_) => Parts::of(tiles, k, LEAST[1], ENOUGH[1]),
            // Eight loads of a thread and more.
            Way::Eights(few) => Parts::of(tiles, k, 8 * few.step(), ENOUGH[2]),
            Way::FewRows(_) => Parts::whole(k),
        }
    }
}

/// Where a product's result goes.
struct Out<'a> {
    dtype: DType,
    at: At,
    /// Its first element, and the length of its rows.
    first: usize,
    n: usize,
    joined: Option<&'a Joined<'a>>,
}

impl Out<'_> {
    /// With what becomes of an element; eight at a time if asked.
    fn of(&self, shader: Shader, eights: bool) -> Shader {
        joined::leaving(shader, (self.dtype, self.at), eights, self.joined)
    }
}

/// A kernel of a file that says which product a workgroup has, with what computes it and stores it, and the rows and columns of a tile.
/// Its factors are `a` and `b`; a result of 16-bit floats is to be stored eight at a time where that can be. `k`: the length of the sums,
/// where it is known. `lead` makes few rows; of these, read by eights, the kernel has `product(group, thread)` and lacks
/// `kernel(group, thread)`.
#[expect(clippy::too_many_arguments, reason = "each is a thing of its own")]
fn product(
    limits: Limits,
    name: &'static str,
    way: Way,
    along_k: [bool; 2],
    [a, b]: [(DType, At); 2],
    out: &Out<'_>,
    k: Option<usize>,
    lead: Option<&Lead>,
) -> (Shader, [usize; 2]) {
    let [rows, columns] = way.tile(along_k[1]);
    let sized = |shader: Shader| {
        shader.constant("TILE_ROWS", rows).constant("TILE_COLUMNS", columns).with("gemm_places").with("gemm_put")
    };
    let by_one = |shader: Shader| out.of(shader.buffer("a", a.0, a.1).buffer("b", b.0, b.1), false);
    let by_eight = |shader: Shader| out.of(shader.by_eight("a", a.0, a.1).by_eight("b", b.0, b.1), false);
    let shader = match way {
        Way::FewRows(rows) => {
            let shader = sized(Shader::file(limits, name, THREADS)).with("gemm_few_rows");
            let shader = shader.constant("SLICES", THREADS / columns).constant("ROWS", rows);
            by_one(shader.flag("RIGHT_ALONG_K", along_k[1]))
        }
        Way::Cooperative(tile) => {
            let eights = out.dtype.bytes() == 2 && out.n.is_multiple_of(8) && out.first.is_multiple_of(8);
            let eights = eights && joined::by_eight(out.joined);
            let shader =
                cooperative::tiled(limits, name, &tile, along_k, a.0, eights, !k.is_some_and(|k| tile.divides(k)));
            out.of(shader.parts("a", a.1).parts("b", b.1), eights)
        }
        Way::Narrow => by_eight(narrow::kernel(limits, name)),
        Way::Eights(few) => by_eight(few.kernel(limits, name, lead)),
        Way::Plain(tile) => by_one(sized(tiled(limits, name, tile, along_k)).with("gemm_plain")),
    };
    (shader, [rows, columns])
}

/// Strides of a matrix, of rows and columns.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    pub(super) row: usize,
    pub(super) column: usize,
}

/// A row-major matrix whose stored form has `columns` columns, read transposed if asked.
pub(super) fn stored(columns: usize, transpose: bool) -> Strides {
    if transpose { Strides { row: 1, column: columns } } else { Strides { row: columns, column: 1 } }
}

/// A batch of products of m rows, n columns and sums of k; counts in elements.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) a: Strides,
    pub(super) a_batch: usize,
    pub(super) b: Strides,
    pub(super) b_batch: usize,
    /// Where B and C begin in their buffers.
    pub(super) b_at: usize,
    pub(super) c_at: usize,
    pub(super) batch: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

impl Product {
    /// One product.
    pub(super) fn of(a: Strides, b: Strides, m: usize, n: usize, k: usize) -> Product {
        Product { a, a_batch: 0, b, b_batch: 0, b_at: 0, c_at: 0, batch: 1, m, n, k }
    }

    /// How many tiles of so many rows and columns there are.
    fn tiles(&self, rows: usize, columns: usize) -> usize {
        self.batch * self.m.div_ceil(rows) * self.n.div_ceil(columns)
    }
}

/// Where the matrices of a product are; `add` is f32.
pub(super) struct Places<'a> {
    pub(super) a: At,
    pub(super) b: At,
    pub(super) bias: (At, DType),
    pub(super) add: At,
    pub(super) c: At,
    /// The chain that C goes through.
    pub(super) joined: Option<&'a Joined<'a>>,
    /// What makes the rows of A, which is where it says.
    pub(super) lead: Option<&'a Lead>,
    /// What follows it in the same kernel, on C, which are logits.
    pub(super) routed: Option<&'a Routed<'a>>,
}

/// The product of matrices of these dtypes as an action; the result's is the third one.
pub(super) fn gemm(limits: Limits, types: [DType; 3], p: &Product, places: &Places<'_>) -> Result<Action, String> {
    kernel(limits, way(limits, types, p), types, p, places, Parts::whole(p.k))
}

/// Whether a lead can make the rows of such a product.
fn leads(limits: Limits, types: [DType; 3], p: &Product, lead: &Lead) -> bool {
    let way = way(limits, types, p);
    let [rows, columns] = way.tile(p.b.row == 1);
    let whole = way.parts(p.tiles(rows, columns), p.k).count == 1;
    whole && p.batch == 1 && matches!(way, Way::Eights(few) if lead.fits(&few, [p.m, p.k], types[0]))
}

/// The same as [`gemm`], its sums cut into parts where it has few tiles. C begins its buffer, and nothing is added but the bias.
fn gemm_in_parts(
    limits: Limits,
    types: [DType; 3],
    p: &Product,
    places: &Places<'_>,
    scratch: &mut Scratch,
) -> Result<Vec<Action>, String> {
    let way = way(limits, types, p);
    let [rows, columns] = way.tile(p.b.row == 1);
    let parts = way.parts(p.tiles(rows, columns), p.k);
    if parts.count == 1 {
        return Ok(vec![kernel(limits, way, types, p, places, parts)?]);
    }
    if places.routed.is_some() {
        return Err("logits whose sums are not in parts".into());
    }
    let total = p.batch * p.m * p.n;
    let sums = scratch.take(4 * parts.count * total);
    let out = Out { dtype: types[2], at: places.c, first: 0, n: p.n, joined: places.joined };
    let of_parts = Places { bias: (At::Null, DType::F32), c: sums, joined: None, lead: None, routed: None, ..*places };
    Ok(vec![
        kernel(limits, way, [types[0], types[1], DType::F32], p, &of_parts, parts)?,
        parts::finish(limits, parts, [total, p.n], sums, places.bias, |s| out.of(s, false))?,
    ])
}

fn way(limits: Limits, types: [DType; 3], p: &Product) -> Way {
    Way::of(limits, [types[0], types[1]], p, |rows, columns| p.tiles(rows, columns))
}

fn kernel(
    limits: Limits,
    way: Way,
    types: [DType; 3],
    p: &Product,
    places: &Places<'_>,
    parts: Parts,
) -> Result<Action, String> {
    let strides = [
        ("a_row", p.a.row),
        ("a_column", p.a.column),
        ("a_batch", p.a_batch),
        ("b_row", p.b.row),
        ("b_column", p.b.column),
        ("b_batch", p.b_batch),
        ("c_batch", p.m * p.n),
        ("b_at", p.b_at),
        ("c_at", p.c_at),
        ("m", p.m),
        ("n", p.n),
        ("k", p.k),
        ("part", parts.length),
        ("total", if parts.count == 1 { 0 } else { p.batch * p.m * p.n }),
    ];
    let factors = [(types[0], places.a), (types[1], places.b)];
    let out = Out { dtype: types[2], at: places.c, first: p.c_at, n: p.n, joined: places.joined };
    // A part is a multiple of every block: the last one ends as k does.
    let (shader, [rows, columns]) =
        product(limits, "gemm", way, [p.a.column == 1, p.b.row == 1], factors, &out, Some(p.k), places.lead);
    let shader = strides.iter().fold(shader.constant("PARTS", parts.count), |s, &(name, value)| s.number(name, value));
    let shader = shader.buffer("bias", places.bias.1, places.bias.0).buffer("add", DType::F32, places.add);
    let groups = [p.n.div_ceil(columns), p.m.div_ceil(rows), p.batch * parts.count];
    let shader = match (places.routed, way) {
        (None, Way::Eights(_)) => shader.declare(PRODUCT_ALONE),
        (None, _) => shader,
        (Some(routed), Way::Eights(few)) if types[2] == DType::F32 => {
            let shader = shader.with("routed").declare(LOGITS).constant("ARRIVALS", groups.iter().product());
            routed.add(shader.arriving("c"), limits, few.threads())?
        }
        (Some(_), _) => return Err("logits of few tokens".into()),
    };
    shader.grid(groups)
}

/// The bias operand, if there is one, and its dtype.
fn bias(graph: &Graph, node: &Node, i: usize) -> (At, DType) {
    if i < node.operands.len() { (At::Operand(i), dtype(graph, node, i)) } else { (At::Null, DType::F32) }
}

pub(super) fn lower_matmul(graph: &Graph, node: &Node, op: &Matmul, around: &Around<'_>, limits: Limits) -> Lowered {
    let (joined, routed) = (around.joined.as_ref(), around.routed.as_ref());
    let [a, b] = shapes(graph, node);
    let out = &graph.ty(node.results[0]).shape;
    let (n, k) = (out.last(), a[a.len() - if op.transpose_a { 2 } else { 1 }]);
    let rank = out.len();
    let batch: usize = out[..rank - 2].iter().product();
    let shared = b.len() == 2;
    // With one B for the whole batch and A not transposed, the batch is just more rows.
    let (batch, m) = if shared && !op.transpose_a { (1, batch * out[rank - 2]) } else { (batch, out[rank - 2]) };
    let product = Product {
        a_batch: m * k,
        b_batch: if shared { 0 } else { k * n },
        batch,
        ..Product::of(stored(a.last(), op.transpose_a), stored(b.last(), op.transpose_b), m, n, k)
    };
    let bias = bias(graph, node, 2);
    let types = [dtype(graph, node, 0), dtype(graph, node, 1), super::dtype_of_result(graph, node, 0)];
    let lead = around.lead.as_ref().filter(|lead| leads(limits, types, &product, lead));
    let a = lead.map_or(At::Operand(0), Lead::rows);
    let places = Places { a, b: At::Operand(1), bias, add: At::Null, c: At::Result(0), joined, lead, routed };
    let mut scratch = Scratch::default();
    let actions = gemm_in_parts(limits, types, &product, &places, &mut scratch)?;
    Ok(Launch::of(actions).with_scratch(&scratch).leading(lead.map(|l| l.kept)))
}

/// E, if the kernels can count it.
fn experts(offsets: &Shape) -> Result<usize, String> {
    let experts = offsets[0] - 1;
    if experts > MOST_EXPERTS { Err(format!("at most {MOST_EXPERTS} experts, not {experts}")) } else { Ok(experts) }
}

pub(super) fn lower_expert_matmul(
    graph: &Graph,
    node: &Node,
    op: &ExpertMatmul,
    around: &Around<'_>,
    limits: Limits,
) -> Lowered {
    let [rows, w, offsets] = shapes(graph, node);
    let experts = experts(&offsets)?;
    let (slots, k, n) = (rows[0], rows[1], graph.shape(node.results[0])[1]);
    let w = stored(w[2], op.transpose);
    let (ty, (at, of_bias)) = (dtype(graph, node, 0), bias(graph, node, 3));
    let types = [ty, dtype(graph, node, 1)];
    // The rows of one expert begin anywhere; a row is whole.
    let of_all = Product { b_batch: k * n, ..Product::of(stored(k, false), w, slots, n, k) };
    let with_weights = |shader: Shader| {
        let shader = shader.number("n", n).number("k", k).number("w_row", w.row).number("w_column", w.column);
        shader.buffer("bias", of_bias, at)
    };
    if slots <= MOST_FEW {
        return by_slot(types, &of_all, [slots, experts], around, limits, with_weights);
    }
    if around.routed.is_some() || around.combined.is_some() {
        return Err(format!("at most {MOST_FEW} slots, not {slots}"));
    }
    let tiles = |rows: usize, columns: usize| slots.div_ceil(rows) * n.div_ceil(columns);
    let tile = cooperative::tile(limits, types, &of_all, slots, tiles);
    let way = tile.map_or_else(|| Way::plain(limits, slots, n), Way::Cooperative);
    let out = Out { dtype: ty, at: At::Result(0), first: 0, n, joined: around.joined.as_ref() };
    let factors = [(types[0], At::Operand(0)), (types[1], At::Operand(1))];
    let along_k = [true, w.row == 1];
    let (shader, [rows, columns]) = product(limits, "gemm_m_grouped", way, along_k, factors, &out, Some(k), None);
    let shader = shader.constant("MOST_EXPERTS", MOST_EXPERTS).number("slots", slots).number("experts", experts);
    let shader = with_weights(shader).buffer("offsets", DType::I32, At::Operand(2));
    Ok(Launch::of(vec![shader.grid([n.div_ceil(columns), most_tiles(slots, experts, rows), 1])?]))
}

/// The product of experts with few slots, which rarely share an expert: each row by itself, its expert found or chosen in the kernel, and
/// combined there if asked.
fn by_slot(
    types: [DType; 2],
    of_all: &Product,
    [slots, experts]: [usize; 2],
    around: &Around<'_>,
    limits: Limits,
    with_weights: impl Fn(Shader) -> Shader,
) -> Lowered {
    let (Product { n, k, .. }, few) = (*of_all, Few::of(limits, of_all, 1, slots));
    let lead = around.lead.as_ref().filter(|lead| few.is_some_and(|few| lead.fits(&few, [1, k], types[0])));
    let (routed, combined) = (around.routed.as_ref(), around.combined.as_ref());
    let (dtype, at) = combined.map_or((types[0], At::Result(0)), Combined::result);
    let joined = combined.map_or(around.joined.as_ref(), |combined| combined.joined.as_ref());
    let out = Out { dtype, at, first: 0, n, joined };
    let factors = [(types[0], lead.map_or(At::Operand(0), Lead::rows)), (types[1], At::Operand(1))];
    let name = if combined.is_some() { "gemm_by_token" } else { "gemm_by_slot" };
    let (way, along_k) = (few.map_or(Way::FewRows(1), Way::Eights), [true, of_all.b.row == 1]);
    let (shader, [_, columns]) = product(limits, name, way, along_k, factors, &out, Some(k), lead);
    let shader = with_weights(shader.with("gemm_slot"));
    let shader = if few.is_some() { shader.declare(PRODUCT_ALONE) } else { shader };
    let mut beside = None;
    let shader = match (routed, few, lead) {
        (None, _, _) => {
            let shader = shader.with("slot_by_offsets").number("experts", experts);
            shader.buffer("offsets", DType::I32, At::Operand(2))
        }
        (Some(routed), Some(few), Some(_)) if slots == 1 && combined.is_none() => {
            // What the routing leaves is made beside the product, which does not wait for it.
            beside = Some(routed.alone(limits)?);
            let shader = shader.with("slot_by_choice").buffer("logits", DType::F32, routed.logits());
            routed.choosing(shader, limits, few.threads())?
        }
        (Some(_), _, _) => return Err("the row of one token".into()),
    };
    let (shader, down) = match (combined, few) {
        (None, _) => (shader, slots),
        (Some(combined), Some(_)) => (combined.add(shader), combined.tokens),
        (Some(_), None) => return Err("rows of which eight elements lie together".into()),
    };
    let actions = [Some(shader.grid([n.div_ceil(columns), down, 1])?), beside];
    Ok(Launch::of(actions.into_iter().flatten().collect())
        .leading(lead.map(|l| l.kept))
        .combining(combined.map(Combined::kept)))
}

pub(super) fn lower_expert_matmul_wgrad(graph: &Graph, node: &Node, limits: Limits) -> Lowered {
    let [a, b, offsets] = shapes(graph, node);
    let (m, n, experts) = (a[1], b[1], offsets[0] - 1);
    let types = [dtype(graph, node, 0), dtype(graph, node, 1)];
    // Sums are as long as a segment, which begins anywhere: on average a part of all slots.
    let of_all = Product::of(stored(m, true), stored(n, false), m, n, a[0] / experts.max(1));
    let tiles = |rows: usize, columns: usize| experts * m.div_ceil(rows) * n.div_ceil(columns);
    let tile = cooperative::tile(limits, types, &of_all, m, tiles);
    let dtype = super::dtype_of_result(graph, node, 0);
    let out = Out { dtype, at: At::Result(0), first: 0, n, joined: None };
    let factors = [(types[0], At::Operand(0)), (types[1], At::Operand(1))];
    let way = tile.map_or_else(|| Way::plain(limits, m, n), Way::Cooperative);
    let (shader, [rows, columns]) = product(limits, "gemm_k_grouped", way, [false, false], factors, &out, None, None);
    let shader = shader.number("m", m).number("n", n).buffer("offsets", DType::I32, At::Operand(2));
    Ok(Launch::of(vec![shader.grid([n.div_ceil(columns), m.div_ceil(rows), experts])?]))
}

/// The most tiles that `rows` rows in the segments of `experts` experts and an unused one can be cut into: each segment has at
/// most one tile that is not full.
fn most_tiles(rows: usize, experts: usize, tile: usize) -> usize {
    rows / tile + experts + 1
}
