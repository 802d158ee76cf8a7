//! The tile of a workgroup on cooperative matrices, whose text is written here with every matrix by its own name: which devices keep
//! in registers only so. And the rule which products get it.
//!
//! Each subgroup of 32 lanes computes a part of the tile. All of them bring the next elements of each row and column along k into the
//! workgroup's memory, 16 bytes at a time and on their way while the last ones are multiplied. Sums are f32. What a row outside of
//! the matrices adds up is not stored, so that such a row may be any other one; only behind the end of the sums there must be zeros.

use std::fmt::Write;

use moebius_ir::DType;

use super::gemm::Product;
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// Lanes of a subgroup.
pub(super) const LANES: usize = 32;
/// Elements that are moved at a time.
const PART: usize = 8;
/// Rows and columns of a matrix.
const MATRIX: usize = 16;
/// Tiles that keep a card busy; with fewer, smaller ones are faster.
const BUSY: usize = 96;
/// The least rows, columns and sums for which a tile is not mostly empty.
const LEAST: usize = 32;

/// How the tile of a workgroup is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Elements along k between two barriers.
    depth: usize,
    /// Rows and columns of a subgroup.
    own: [usize; 2],
}

const LARGE: Tile = Tile { rows: 128, columns: 128, depth: 32, own: [64, 64] };
const DEEP: Tile = Tile { rows: 128, columns: 128, depth: 64, own: [64, 32] };
const SMALL: Tile = Tile { rows: 64, columns: 64, depth: 32, own: [32, 32] };

impl Tile {
    /// Whether sums of this length end with a whole block.
    pub(super) fn divides(&self, k: usize) -> bool {
        k.is_multiple_of(self.depth)
    }

    fn subgroups(&self) -> usize {
        self.rows / self.own[0] * (self.columns / self.own[1])
    }

    /// The factors as they lie in the workgroup's memory.
    fn factors(&self, along_k: [bool; 2]) -> [Room; 2] {
        let left = Room::of(true, 0, self, along_k[0]);
        let right = Room::of(false, left.size(), self, along_k[1]);
        [left, right]
    }

    /// Parts from one row of a subgroup's sums to the next: those are f32, four to a vector, and leave by rows of matrices.
    fn out_pitch(&self) -> usize {
        self.own[1] / 4 + 1
    }

    /// Parts of the workgroup's memory that are used.
    fn room(&self, along_k: [bool; 2]) -> usize {
        let [left, right] = self.factors(along_k);
        (left.size() + right.size()).max(self.subgroups() * MATRIX * self.out_pitch())
    }

    fn threads(&self) -> usize {
        self.subgroups() * LANES
    }
}

/// The tile by which a product is computed on cooperative matrices; `None` if it is not. `rows`, and `tiles_of(rows, columns)`: of the
/// left matrix, and how many tiles of such a size there are.
pub(super) fn tile(
    limits: Limits,
    types: [DType; 2],
    p: &Product,
    rows: usize,
    tiles_of: impl Fn(usize, usize) -> usize,
) -> Option<Tile> {
    let can = match types {
        [DType::Bf16, DType::Bf16] => limits.matrices_bf16,
        [DType::F16, DType::F16] => limits.matrices_f16,
        _others => false,
    };
    // What lies together in memory is moved in whole parts, and every row of it begins with one.
    let whole = |s: super::gemm::Strides, along_k: usize, across: usize| match (s.row, s.column) {
        (pitch, 1) => pitch.is_multiple_of(PART) && along_k.is_multiple_of(PART),
        (1, pitch) => pitch.is_multiple_of(PART) && across.is_multiple_of(PART),
        _others => false,
    };
    let turned = super::gemm::Strides { row: p.b.column, column: p.b.row };
    let fits = whole(p.a, p.k, p.m) && whole(turned, p.k, p.n);
    let begins = [p.a_batch, p.b_batch, p.b_at].iter().all(|at| at.is_multiple_of(PART));
    if !(can && fits && begins && rows >= LEAST && p.n >= LEAST && p.k >= LEAST) {
        return None;
    }
    let large = rows >= LARGE.rows && p.n >= LARGE.columns && tiles_of(LARGE.rows, LARGE.columns) >= BUSY;
    // Columns of b that lie along k are slow to read by the large subgroups; half of one, and longer blocks, make up for it.
    let along_k = [p.a.column == 1, p.b.row == 1];
    let deep = large && along_k[1] && 16 * DEEP.room(along_k) <= limits.shared;
    Some(if deep {
        DEEP
    } else if large {
        LARGE
    } else {
        SMALL
    })
}

/// A kernel that computes tiles of products of `dtype` so; `along_k` as for the plain one. Its factors are the buffers `a` and `b`,
/// which are given as [`Shader::parts`]. With `eights` the result `c` is one of 16 bytes too; without
/// `last` sums end with a whole block.
pub(super) fn tiled(
    limits: Limits,
    name: &'static str,
    tile: &Tile,
    along_k: [bool; 2],
    dtype: DType,
    eights: bool,
    last: bool,
) -> Shader {
    let shader = Shader::file(limits, name, tile.threads()).with("gemm_places");
    let shader = shader.constant("TILE_ROWS", tile.rows).constant("TILE_COLUMNS", tile.columns);
    let shader = shader.flag("LAST", last).with(if eights { "gemm_put_eight" } else { "gemm_put" });
    shader.cooperative(dtype).declare(&text(tile, along_k, eights))
}

/// A factor as it lies in the workgroup's memory, in parts.
struct Room {
    /// Its name in the text, and whether it is the left one.
    name: char,
    left: bool,
    /// Where it begins.
    start: usize,
    /// Parts of a row that are used, and from one row to the next: rows begin in different banks.
    wide: usize,
    pitch: usize,
    rows: usize,
    along_k: bool,
    /// Parts that a thread moves, each so many rows behind the last one.
    moves: usize,
    apart: usize,
}

impl Room {
    fn of(left: bool, start: usize, tile: &Tile, along_k: bool) -> Room {
        let (name, side) = if left { ('l', tile.rows) } else { ('r', tile.columns) };
        let (wide, rows) = if along_k { (tile.depth / PART, side) } else { (side / PART, tile.depth) };
        let apart = tile.threads() / wide;
        Room { name, left, start, wide, pitch: wide + 1, rows, along_k, moves: rows / apart, apart }
    }

    fn size(&self) -> usize {
        self.pitch * self.rows
    }

    fn buffer(&self) -> char {
        if self.left { 'a' } else { 'b' }
    }

    /// Where the first element of the thread's part `i` lies in memory, of the block from `k0` on; that of the tile's first row or
    /// column instead, which is there, if `first`.
    fn element(&self, i: usize, k0: &str, first: bool) -> String {
        let (n, apart) = (self.name, i * self.apart);
        let (line, part) = (format!("{n}line + {apart}u"), format!("{n}part * {PART}u"));
        let (across, k) = if self.along_k { (line, part) } else { (part, line) };
        let side = if self.left { "row0" } else { "column0" };
        let across = if first { side.to_owned() } else { format!("{side} + {across}") };
        if self.left { format!("left_at({across}, {k0} + {k})") } else { format!("right_at({k0} + {k}, {across})") }
    }

    /// Which parts the thread moves: where they begin in memory, and the first one in the room.
    fn begin(&self, s: &mut String, tile: &Tile) {
        let n = self.name;
        let side = if self.left { "left" } else { "right" };
        let _ = writeln!(
            s,
            "    let {n}line = thread / {wide}u;\n    let {n}part = thread % {wide}u;\n    \
             let {n}to = {}u + {n}line * {}u + {n}part;\n    let {n}step = {side}_step() * {}u;",
            self.start,
            self.pitch,
            tile.depth / PART,
            wide = self.wide,
        );
        for i in 0..self.moves {
            let _ = writeln!(s, "    var {n}{i} = vec4<f32>();");
            // Parts that differ in k are all there or none is.
            if i > 0 && !self.along_k {
                continue;
            }
            let _ = writeln!(
                s,
                "    var {n}at{i} = {};\n    if ({n}at{i} == NOWHERE) {{ {n}at{i} = {}; }}\n    {n}at{i} = {n}at{i} / {PART}u;",
                self.element(i, "0u", false),
                self.element(i, "0u", true),
            );
        }
        if !self.along_k {
            let _ = writeln!(s, "    let {n}apart = {side}_step() / {PART}u * {}u;", self.apart);
        }
    }

    /// Loads of the thread's parts of the next whole block.
    fn load(&self, s: &mut String) {
        let (n, x) = (self.name, self.buffer());
        for i in 0..self.moves {
            let _ = if self.along_k {
                writeln!(s, "        {n}{i} = {x}[{n}at{i}];\n        {n}at{i} += {n}step;")
            } else {
                writeln!(s, "        {n}{i} = {x}[{n}at0 + {n}apart * {i}u];")
            };
        }
        if !self.along_k {
            let _ = writeln!(s, "        {n}at0 += {n}step;");
        }
    }

    /// Loads of the block at the end of the sums, which is not whole.
    fn load_last(&self, s: &mut String) {
        for i in 0..self.moves {
            let _ = writeln!(
                s,
                "        {}{i} = part_of_{}({});",
                self.name,
                self.buffer(),
                self.element(i, "whole", false)
            );
        }
    }

    fn put(&self, s: &mut String) {
        for i in 0..self.moves {
            let _ = writeln!(s, "        room[{n}to + {}u] = {n}{i};", i * self.apart * self.pitch, n = self.name);
        }
    }
}

fn text(tile: &Tile, along_k: [bool; 2], eights: bool) -> String {
    let [left, right] = tile.factors(along_k);
    let [own_rows, own_columns] = tile.own;
    let (depth, across) = (tile.depth, tile.columns / own_columns);
    let room = tile.room(along_k);
    let factors = [&left, &right];
    let mut products = String::new();
    factors.iter().for_each(|f| f.put(&mut products));
    products.push_str("        workgroupBarrier();\n");

    let mut s = String::new();
    let _ = writeln!(s, "var<workgroup> room: array<vec4<f32>, {room}>;");
    for x in ["a", "b"] {
        let _ = writeln!(
            s,
            "fn part_of_{x}(at: u32) -> vec4<f32> {{\n    if (at != NOWHERE) {{ return {x}[at / {PART}u]; }}\n    return vec4<f32>();\n}}"
        );
    }
    let _ = writeln!(
        s,
        "fn kernel(group: vec3<u32>, thread: u32) {{\n    if (!place(group, thread)) {{ return; }}\n    let lane = thread % {LANES}u;\n    \
         let subgroup = thread / {LANES}u;\n    let my_row = subgroup / {across}u * {own_rows}u;\n    \
         let my_column = subgroup % {across}u * {own_columns}u;\n    let whole = depth / {depth}u * {depth}u;"
    );
    factors.iter().for_each(|f| f.begin(&mut s, tile));
    for i in 0..own_rows / MATRIX {
        for j in 0..own_columns / MATRIX {
            let _ = writeln!(s, "    var c{i}_{j} = coop_mat16x16<f32, C>();");
        }
    }
    s.push_str("    if (whole > 0u) {\n");
    factors.iter().for_each(|f| f.load(&mut s));
    let _ = writeln!(s, "    }}\n    for (var k0 = {depth}u; k0 <= whole; k0 += {depth}u) {{");
    s.push_str(&products);
    s.push_str("        if (k0 < whole) {\n");
    factors.iter().for_each(|f| f.load(&mut s));
    s.push_str("        }\n");
    multiply(&mut s, tile, factors);
    s.push_str("        workgroupBarrier();\n    }\n    if (LAST && whole < depth) {\n");
    factors.iter().for_each(|f| f.load_last(&mut s));
    s.push_str(&products);
    multiply(&mut s, tile, factors);
    s.push_str("        workgroupBarrier();\n    }\n");
    store(&mut s, tile, eights);
    s.push_str("}\n");
    s
}

/// The products of the block that lies in the room.
fn multiply(s: &mut String, tile: &Tile, [left, right]: [&Room; 2]) {
    for k in (0..tile.depth).step_by(MATRIX) {
        s.push_str("        {\n");
        for i in 0..tile.own[0] / MATRIX {
            let row = format!("(my_row + {}u)", i * MATRIX);
            let (load, at) = if left.along_k {
                ("coopLoadT", format!("{}u + {row} * {}u", left.start + k / PART, left.pitch))
            } else {
                ("coopLoad", format!("{}u + {row} / {PART}u", left.start + k * left.pitch))
            };
            let _ = writeln!(s, "            let a{i} = {load}<coop_mat16x16<f32, A>>(&room[{at}], {}u);", left.pitch);
        }
        for j in 0..tile.own[1] / MATRIX {
            let column = format!("(my_column + {}u)", j * MATRIX);
            let (load, at) = if right.along_k {
                ("coopLoad", format!("{}u + {column} * {}u", right.start + k / PART, right.pitch))
            } else {
                ("coopLoadT", format!("{}u + {column} / {PART}u", right.start + k * right.pitch))
            };
            let _ = writeln!(s, "            let b{j} = {load}<coop_mat16x16<f32, B>>(&room[{at}], {}u);", right.pitch);
            for i in 0..tile.own[0] / MATRIX {
                let _ = writeln!(s, "            c{i}_{j} = coopMultiplyAdd(a{i}, b{j}, c{i}_{j});");
            }
        }
        s.push_str("        }\n");
    }
}

/// The sums of each subgroup are stored by way of its part of the room, a row of matrices at a time.
fn store(s: &mut String, tile: &Tile, eights: bool) {
    let out_pitch = tile.out_pitch();
    let [own_rows, own_columns] = tile.own;
    let _ = writeln!(s, "    let mine = subgroup * {}u;", MATRIX * out_pitch);
    let width = if eights { PART } else { 1 };
    for i in 0..own_rows / MATRIX {
        for j in 0..own_columns / MATRIX {
            let _ = writeln!(
                s,
                "    {{\n        let sums = c{i}_{j};\n        let at = mine + {}u;\n        coopStoreT(sums, &room[at], {out_pitch}u);\n    }}",
                j * MATRIX / 4
            );
        }
        let _ = writeln!(
            s,
            "    workgroupBarrier();\n    for (var e = lane; e < {}u; e += {LANES}u) {{\n        let row = e / {across}u;\n        \
             let column = e % {across}u * {width}u;\n        let taken = mine + row * {out_pitch}u + column / 4u;\n        \
             let four = room[taken];",
            MATRIX * own_columns / width,
            across = own_columns / width,
        );
        let at = format!("row0 + my_row + {}u + row, column0 + my_column + column", i * MATRIX);
        let _ = if eights {
            writeln!(s, "        put_eight({at}, four, room[taken + 1u]);")
        } else {
            writeln!(s, "        put({at}, four[column % 4u]);")
        };
        s.push_str("    }\n    workgroupBarrier();\n");
    }
}
