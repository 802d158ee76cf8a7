//! The tile of a workgroup on cooperative matrices, whose text is written here with every matrix by its own name: which devices keep
//! in registers only so. And the rule which products get it.
//!
//! Four subgroups of 32 lanes compute a quarter of the tile each. All of them bring the next [`DEPTH`] elements of each row and column
//! into the workgroup's memory, 16 bytes at a time and on their way while the last ones are multiplied. Sums are f32.

use std::fmt::Write;

use moebius_ir::DType;

use super::gemm::Product;
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// Threads of a workgroup: four subgroups.
const THREADS: usize = 4 * LANES;
/// Lanes of a subgroup.
pub(super) const LANES: usize = 32;
/// Elements along k between two barriers.
const DEPTH: usize = 32;
/// Elements that are moved at a time.
const PART: usize = 8;
/// Rows and columns of a matrix.
const MATRIX: usize = 16;
/// Rows and columns of the tile of a workgroup.
const LARGE: usize = 128;
const SMALL: usize = 64;
/// Tiles that keep a card busy; with fewer, smaller ones are faster.
const BUSY: usize = 96;
/// The least rows, columns and sums for which a tile is not mostly empty.
const LEAST: usize = 32;

/// The side of the tile by which a product is computed on cooperative matrices; `None` if it is not. `rows` and `tiles_of(side)`: of
/// the left matrix, and how many tiles there are.
pub(super) fn side(
    limits: Limits,
    types: [DType; 2],
    p: &Product,
    rows: usize,
    tiles_of: impl Fn(usize) -> usize,
) -> Option<usize> {
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
    let large = rows >= LARGE && p.n >= LARGE && tiles_of(LARGE) >= BUSY;
    Some(if large { LARGE } else { SMALL })
}

/// A kernel that computes tiles of products of `dtype` so; `along_k` as for the plain one. Its factors are the buffers `a` and `b`,
/// which are given as [`Shader::parts`].
pub(super) fn tiled(limits: Limits, name: &'static str, side: usize, along_k: [bool; 2], dtype: DType) -> Shader {
    let shader = Shader::file(limits, name, THREADS).with("gemm_places").constant("TILE", side);
    shader.cooperative(dtype).declare(&text(side, along_k))
}

/// Of a factor: how wide its rows are in the workgroup's memory, in parts, and how many there are.
fn rows(side: usize, along_k: bool) -> (usize, usize) {
    if along_k { (DEPTH / PART, side) } else { (side / PART, DEPTH) }
}

fn text(side: usize, along_k: [bool; 2]) -> String {
    // Rows begin in different banks.
    let [left, right] = along_k.map(|along| rows(side, along));
    let (left_pitch, right_pitch) = (left.0 + 1, right.0 + 1);
    let right_from = left_pitch * left.1;
    // A quarter of the tile; its sums are f32, four to a vector, and leave by rows of matrices.
    let quarter = side / 2;
    let own = quarter / MATRIX;
    let out_pitch = quarter / 4 + 1;
    let room = (right_from + right_pitch * right.1).max(4 * MATRIX * out_pitch);
    let moves = side * DEPTH / PART / THREADS;

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
         let subgroup = thread / {LANES}u;\n    let my_row = subgroup / 2u * {quarter}u;\n    let my_column = subgroup % 2u * {quarter}u;"
    );
    // Which parts the thread moves, and where to.
    for i in 0..moves {
        for (x, (wide, _), pitch, from) in [("l", left, left_pitch, 0), ("r", right, right_pitch, right_from)] {
            let _ = writeln!(
                s,
                "    let {x}o{i} = (thread + {}u) / {wide}u;\n    let {x}i{i} = (thread + {}u) % {wide}u;\n    \
                 let {x}to{i} = {from}u + {x}o{i} * {pitch}u + {x}i{i};",
                i * THREADS,
                i * THREADS
            );
        }
    }
    let moved = |i: usize, k0: &str| {
        let left = if along_k[0] {
            format!("left_at(row0 + lo{i}, {k0} + li{i} * {PART}u)")
        } else {
            format!("left_at(row0 + li{i} * {PART}u, {k0} + lo{i})")
        };
        let right = if along_k[1] {
            format!("right_at({k0} + ri{i} * {PART}u, column0 + ro{i})")
        } else {
            format!("right_at({k0} + ro{i}, column0 + ri{i} * {PART}u)")
        };
        [("l", format!("part_of_a({left})")), ("r", format!("part_of_b({right})"))]
    };
    for i in 0..moves {
        for (x, value) in moved(i, "0u") {
            let _ = writeln!(s, "    var {x}{i} = {value};");
        }
    }
    for i in 0..own {
        for j in 0..own {
            let _ = writeln!(s, "    var c{i}_{j} = coop_mat16x16<f32, C>();");
        }
    }
    let _ = writeln!(s, "    for (var k0 = 0u; k0 < depth; k0 += {DEPTH}u) {{");
    for i in 0..moves {
        let _ = writeln!(s, "        room[lto{i}] = l{i};\n        room[rto{i}] = r{i};");
    }
    let _ = writeln!(s, "        workgroupBarrier();\n        let next = k0 + {DEPTH}u;\n        if (next < depth) {{");
    for i in 0..moves {
        for (x, value) in moved(i, "next") {
            let _ = writeln!(s, "            {x}{i} = {value};");
        }
    }
    s.push_str("        }\n");
    for k in (0..DEPTH).step_by(MATRIX) {
        s.push_str("        {\n");
        for i in 0..own {
            let row = format!("(my_row + {}u)", i * MATRIX);
            let (load, at) = if along_k[0] {
                ("coopLoadT", format!("{row} * {left_pitch}u + {}u", k / PART))
            } else {
                ("coopLoad", format!("{}u + {row} / {PART}u", k * left_pitch))
            };
            let _ = writeln!(s, "            let a{i} = {load}<coop_mat16x16<f32, A>>(&room[{at}], {left_pitch}u);");
        }
        for j in 0..own {
            let column = format!("(my_column + {}u)", j * MATRIX);
            let (load, at) = if along_k[1] {
                ("coopLoad", format!("{}u + {column} * {right_pitch}u", right_from + k / PART))
            } else {
                ("coopLoadT", format!("{}u + {column} / {PART}u", right_from + k * right_pitch))
            };
            let _ = writeln!(s, "            let b{j} = {load}<coop_mat16x16<f32, B>>(&room[{at}], {right_pitch}u);");
            for i in 0..own {
                let _ = writeln!(s, "            c{i}_{j} = coopMultiplyAdd(a{i}, b{j}, c{i}_{j});");
            }
        }
        s.push_str("        }\n");
    }
    s.push_str("        workgroupBarrier();\n    }\n");
    let _ = writeln!(s, "    let mine = subgroup * {}u;", MATRIX * out_pitch);
    for i in 0..own {
        for j in 0..own {
            let _ = writeln!(
                s,
                "    {{\n        let sums = c{i}_{j};\n        let at = mine + {}u;\n        coopStoreT(sums, &room[at], {out_pitch}u);\n    }}",
                j * MATRIX / 4
            );
        }
        let _ = writeln!(
            s,
            "    workgroupBarrier();\n    for (var e = lane; e < {}u; e += {LANES}u) {{\n        let row = e / {quarter}u;\n        \
             let column = e % {quarter}u;\n        let four = room[mine + row * {out_pitch}u + column / 4u];\n        \
             put(row0 + my_row + {}u + row, column0 + my_column + column, four[column % 4u]);\n    }}\n    workgroupBarrier();",
            MATRIX * quarter,
            i * MATRIX
        );
    }
    s.push_str("}\n");
    s
}
