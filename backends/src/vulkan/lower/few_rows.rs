//! Products of few rows, in which reading the right matrix is the work: 16 bytes of it at a time and many such loads of a thread on
//! their way. The text is written here, with every sum by its own name, which devices keep in registers only so. And the rule which
//! products these are.
//!
//! The order of a sum depends on its length and on the columns of the right matrix, neither on the row nor on how many there are.

use std::fmt::Write;

use super::gemm::Product;
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 256;
/// Elements that are read together.
const EIGHT: usize = 8;
/// Threads that share a column where columns lie along k.
const LANES: usize = 32;
/// Workgroups that keep a large GPU busy.
const ENOUGH: usize = 128;

/// How such a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Few {
    pub(super) rows: usize,
    /// Neighbours along k lie together in the right matrix.
    along_k: bool,
    /// Threads side by side along a row of the right matrix, or columns of a thread where those lie along k.
    across: usize,
}

impl Few {
    /// For products of `p` with so many rows, in `batch` of them; `None` if it is none of these.
    pub(super) fn of(p: &Product, rows: usize, batch: usize) -> Option<Few> {
        let along_k = p.b.row == 1 && p.b.column != 1;
        let (pitch, width) = if along_k { (p.b.column, p.k) } else { (p.b.row, p.n) };
        let together = p.a.column == 1 && (along_k || p.b.column == 1);
        let in_eights = [p.k, width, pitch, p.a_batch, p.b_batch, p.b_at].iter().all(|n| n.is_multiple_of(EIGHT));
        let begins = rows == 1 || p.a.row.is_multiple_of(EIGHT);
        if !(together && in_eights && begins && p.k > 0 && (1..=EIGHT).contains(&rows)) {
            return None;
        }
        let groups = |columns: usize| p.n.div_ceil(columns) * batch;
        let across = if along_k {
            let most = if rows > 2 { 2 } else { 4 };
            [4, 2].into_iter().find(|&c| c <= most && groups(THREADS / LANES * c) >= 2 * ENOUGH).unwrap_or(1)
        } else {
            [8, 4].into_iter().find(|&a| groups(EIGHT * a) >= ENOUGH).unwrap_or(2)
        };
        Some(Few { rows, along_k, across })
    }

    /// Columns of a workgroup.
    pub(super) fn columns(&self) -> usize {
        if self.along_k { THREADS / LANES * self.across } else { EIGHT * self.across }
    }

    /// Elements along k that a workgroup reads at once.
    pub(super) fn step(&self) -> usize {
        EIGHT * if self.along_k { LANES } else { THREADS / self.across }
    }

    /// The kernel of a file that says which product a workgroup has. Its factors are the buffers `a` and `b`, which are given as
    /// [`Shader::by_eight`].
    pub(super) fn kernel(&self, limits: Limits, name: &'static str) -> Shader {
        let text = if self.along_k { self.along_k_text() } else { self.across_text() };
        let shader = Shader::file(limits, name, THREADS).with("eight").with("gemm_places").with("gemm_put");
        shader.constant("TILE_ROWS", self.rows).constant("TILE_COLUMNS", self.columns()).declare(&text)
    }

    /// A thread has eight columns, and eight of k at a time; every row of the right matrix is that of `across` threads.
    fn across_text(&self) -> String {
        let (across, slices, twice) = (self.across, THREADS / self.across, 2 * self.across);
        let mut s = format!(
            "var<workgroup> room: array<vec4<f32>, {}>;\n\
             // What the slices have of the thread's column, in two steps; a fixed order.\n\
             fn together(thread: u32) -> f32 {{\n    \
                 workgroupBarrier();\n    \
                 let v = thread % {twice}u;\n    \
                 let first = thread / {twice}u;\n    \
                 var some = vec4<f32>();\n    \
                 if (first < 16u) {{\n        \
                     for (var i = 0u; i < {each}u; i++) {{ some += room[(first * {each}u + i) * {twice}u + v]; }}\n    }}\n    \
                 workgroupBarrier();\n    \
                 if (first < 16u) {{ room[first * {twice}u + v] = some; }}\n    \
                 workgroupBarrier();\n    \
                 var sum = 0.0f;\n    \
                 if (thread < {columns}u) {{\n        \
                     let mine = thread / 8u * 2u + thread % 2u;\n        \
                     for (var i = 0u; i < 16u; i++) {{ sum += room[i * {twice}u + mine][thread % 8u / 2u]; }}\n    }}\n    \
                 workgroupBarrier();\n    \
                 return sum;\n}}\n",
            2 * THREADS,
            each = slices / 16,
            columns = self.columns(),
        );
        let _ = writeln!(
            s,
            "fn kernel(group: vec3<u32>, thread: u32) {{\n    if (!place(group, thread)) {{ return; }}\n    \
             let column = column0 + thread % {across}u * 8u;\n    let step = right_step();"
        );
        for r in 0..self.rows {
            let _ = writeln!(s, "    var even{r} = vec4<f32>();\n    var odd{r} = vec4<f32>();");
        }
        let _ = writeln!(
            s,
            "    for (var k = thread / {across}u * 8u; k < depth; k += {}u) {{\n        let at = right_at(k, column);\n        \
             if (at == NOWHERE) {{ break; }}",
            self.step()
        );
        for i in 0..EIGHT {
            let _ = writeln!(s, "        let b{i} = eight_b(at + {i}u * step);");
        }
        for r in 0..self.rows {
            let _ = writeln!(s, "        let x{r} = eight_a(left_at(row0 + {r}u, k));");
        }
        for i in 0..EIGHT {
            let of_x = format!("{}.{}", if i % 2 == 0 { "even" } else { "odd" }, ["x", "y", "z", "w"][i / 2]);
            for r in 0..self.rows {
                for part in ["even", "odd"] {
                    let _ = writeln!(s, "        {part}{r} = fma(vec4<f32>(x{r}.{of_x}), b{i}.{part}, {part}{r});");
                }
            }
        }
        s.push_str("    }\n");
        for r in 0..self.rows {
            let _ = writeln!(
                s,
                "    room[thread * 2u] = even{r};\n    room[thread * 2u + 1u] = odd{r};\n    let sum{r} = together(thread);\n    \
                 if (thread < {}u) {{ put(row0 + {r}u, column0 + thread, sum{r}); }}",
                self.columns()
            );
        }
        s.push_str("}\n");
        s
    }

    /// 32 threads have `across` columns, and eight of k each at a time.
    fn along_k_text(&self) -> String {
        let (across, columns) = (self.across, self.columns());
        let mut s = format!(
            "var<workgroup> room: array<f32, {}>;\n\
             // What the lanes have of column `thread`, in two steps; a fixed order.\n\
             fn together(thread: u32) -> f32 {{\n    \
                 workgroupBarrier();\n    \
                 let line = thread / 8u * 33u;\n    \
                 var some = 0.0f;\n    \
                 if (thread < {columns}u * 8u) {{\n        \
                     for (var i = 0u; i < 4u; i++) {{ some += room[line + thread % 8u * 4u + i]; }}\n    }}\n    \
                 workgroupBarrier();\n    \
                 if (thread < {columns}u * 8u) {{ room[line + thread % 8u] = some; }}\n    \
                 workgroupBarrier();\n    \
                 var sum = 0.0f;\n    \
                 if (thread < {columns}u) {{\n        \
                     for (var i = 0u; i < 8u; i++) {{ sum += room[thread * 33u + i]; }}\n    }}\n    \
                 workgroupBarrier();\n    \
                 return sum;\n}}\n",
            columns * 33,
        );
        let _ = writeln!(
            s,
            "fn kernel(group: vec3<u32>, thread: u32) {{\n    if (!place(group, thread)) {{ return; }}\n    \
             let lane = thread % {LANES}u;\n    let mine = thread / {LANES}u * {across}u;\n    var k = lane * 8u;"
        );
        for c in 0..across {
            // A column behind the last is read as the last, and not stored.
            let _ = writeln!(s, "    let at{c} = right_at(0u, min(column0 + mine + {c}u, p.n - 1u));");
        }
        for r in 0..self.rows {
            let _ = writeln!(s, "    let from{r} = left_at(row0 + {r}u, 0u);");
            for c in 0..across {
                let _ = writeln!(s, "    var sum{r}_{c} = vec4<f32>();");
            }
        }
        let steps = |s: &mut String, count: usize| {
            for u in 0..count {
                for c in 0..across {
                    let _ = writeln!(s, "        let b{u}_{c} = eight_b(at{c} + k + {}u);", u * self.step());
                }
            }
            for u in 0..count {
                for r in 0..self.rows {
                    let _ = writeln!(s, "        let x{u}_{r} = eight_a(from{r} + k + {}u);", u * self.step());
                    for c in 0..across {
                        for part in ["even", "odd"] {
                            let _ =
                                writeln!(s, "        sum{r}_{c} = fma(x{u}_{r}.{part}, b{u}_{c}.{part}, sum{r}_{c});");
                        }
                    }
                }
            }
        };
        // Two steps at a time, as far as there are two.
        let _ = writeln!(s, "    for (; k + {}u < depth; k += {}u) {{", self.step(), 2 * self.step());
        steps(&mut s, 2);
        s.push_str("    }\n    if (k < depth) {\n");
        steps(&mut s, 1);
        s.push_str("    }\n");
        for r in 0..self.rows {
            for c in 0..across {
                let sum = format!("sum{r}_{c}");
                let _ =
                    writeln!(s, "    room[(mine + {c}u) * 33u + lane] = ({sum}.x + {sum}.y) + ({sum}.z + {sum}.w);");
            }
            let _ = writeln!(
                s,
                "    let all{r} = together(thread);\n    if (thread < {columns}u) {{ put(row0 + {r}u, column0 + thread, all{r}); }}"
            );
        }
        s.push_str("}\n");
        s
    }
}
