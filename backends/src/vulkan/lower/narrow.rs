//! Products with few columns, of numbers that lie together along k in both matrices, as a router's logits are: reading the left matrix is
//! most of the work. Both come into the workgroup's memory eight elements at a time, on their way while the last ones are multiplied, and
//! a thread adds up four sums of each of its elements side by side, each over every fourth product. The text is written here, with every
//! sum by its own name, which devices keep in registers only so.

use std::fmt::Write;

use super::gemm::Product;
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 128;
/// Rows and columns of a workgroup, and elements along k between two barriers.
pub(super) const TILE: [usize; 2] = [64, 32];
const DEPTH: usize = 32;
/// Rows and columns of a thread, and how far they are from one to the next.
const OWN: usize = 4;
const APART: [usize; 2] = [TILE[0] / OWN, TILE[1] / OWN];
const EIGHT: usize = 8;
/// Quadruples of a line in the workgroup's memory: lines lie in different banks.
const PITCH: usize = DEPTH / 4 + 1;
/// Lines that are brought at once.
const LINES: usize = THREADS / (DEPTH / EIGHT);
/// The most columns, and the longest sums: the four of an element are added up one by one.
const MOST_COLUMNS: usize = 64;
const MOST_K: usize = 4096;

/// Whether a product is one of these.
pub(super) fn fits(p: &Product) -> bool {
    let along_k = p.a.column == 1 && p.b.row == 1;
    let begins = [p.a.row, p.b.column, p.k, p.a_batch, p.b_batch, p.b_at].iter().all(|n| n.is_multiple_of(EIGHT));
    along_k && begins && p.n <= MOST_COLUMNS && (1..=MOST_K).contains(&p.k)
}

/// The kernel of a file that says which product a workgroup has. Its factors are the buffers `a` and `b`, which are given as
/// [`Shader::by_eight`].
pub(super) fn kernel(limits: Limits, name: &'static str) -> Shader {
    let shader = Shader::file(limits, name, THREADS).with("eight").with("gemm_places").with("gemm_put");
    shader.constant("TILE_ROWS", TILE[0]).constant("TILE_COLUMNS", TILE[1]).declare(&text())
}

/// What a thread brings of the block of k from `k0` on: the names, which lines, and from where.
fn brought(k0: &str) -> Vec<(String, usize, String)> {
    let lines = |side: usize| (0..side).step_by(LINES);
    let left = lines(TILE[0]).map(|l| (format!("l{l}"), l, format!("left_eight(row0 + line + {l}u, {k0} + part)")));
    let right = lines(TILE[1])
        .map(|l| (format!("r{l}"), TILE[0] + l, format!("right_eight({k0} + part, column0 + line + {l}u)")));
    left.chain(right).collect()
}

fn text() -> String {
    let mut s = format!(
        "var<workgroup> room: array<vec4<f32>, {}>;\n\
         fn left_eight(row: u32, k: u32) -> Eight {{\n    let at = left_at(row, k);\n    if (at == NOWHERE) {{ return Eight(); }}\n    \
         return eight_a(at);\n}}\n\
         fn right_eight(k: u32, column: u32) -> Eight {{\n    let at = right_at(k, column);\n    \
         if (at == NOWHERE) {{ return Eight(); }}\n    return eight_b(at);\n}}\n\
         fn kernel(group: vec3<u32>, thread: u32) {{\n    if (!place(group, thread)) {{ return; }}\n    \
         let line = thread / {parts}u;\n    let part = thread % {parts}u * {EIGHT}u;\n    \
         let to = line * {PITCH}u + thread % {parts}u * 2u;\n    \
         let my_row = thread / {across}u;\n    let my_column = thread % {across}u;\n",
        (TILE[0] + TILE[1]) * PITCH,
        parts = DEPTH / EIGHT,
        across = APART[1],
    );
    for (name, _, from) in brought("0u") {
        let _ = writeln!(s, "    var {name} = {from};");
    }
    let own = || (0..OWN).flat_map(|i| (0..OWN).map(move |j| (i, j)));
    for (i, j) in own() {
        let _ = writeln!(s, "    var sum{i}_{j} = vec4<f32>();");
    }
    let _ = writeln!(s, "    for (var k0 = 0u; k0 < depth; k0 += {DEPTH}u) {{");
    for (name, line, _) in brought("") {
        let at = line * PITCH;
        let _ = writeln!(s, "        room[to + {at}u] = {name}.even;\n        room[to + {}u] = {name}.odd;", at + 1);
    }
    s.push_str("        workgroupBarrier();\n");
    for (name, _, from) in brought(&format!("k0 + {DEPTH}u")) {
        let _ = writeln!(s, "        {name} = {from};");
    }
    for q in 0..DEPTH / 4 {
        s.push_str("        {\n");
        for i in 0..OWN {
            let _ = writeln!(s, "            let x{i} = room[my_row * {PITCH}u + {}u];", i * APART[0] * PITCH + q);
        }
        for j in 0..OWN {
            let at = (TILE[0] + j * APART[1]) * PITCH + q;
            let _ = writeln!(s, "            let y{j} = room[my_column * {PITCH}u + {at}u];");
        }
        for (i, j) in own() {
            let _ = writeln!(s, "            sum{i}_{j} = fma(x{i}, y{j}, sum{i}_{j});");
        }
        s.push_str("        }\n");
    }
    s.push_str("        workgroupBarrier();\n    }\n");
    for (i, j) in own() {
        let (row, column, sum) = (i * APART[0], j * APART[1], format!("sum{i}_{j}"));
        let _ = writeln!(
            s,
            "    put(row0 + my_row + {row}u, column0 + my_column + {column}u, ({sum}.x + {sum}.y) + ({sum}.z + {sum}.w));"
        );
    }
    s.push_str("}\n");
    s
}
