//! Products of few rows, in which reading the right matrix is the work: 16 bytes of it at a time and many such loads of a thread on
//! their way. The text is written here, with every sum by its own name, which devices keep in registers only so. And the rule which
//! products these are.
//!
//! The order of a sum depends on the shapes of the product, neither on the row nor on what other rows hold.

use std::fmt::Write;

use super::gemm::Product;
use super::lead::{self, Lead};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

/// Threads of a workgroup, and the most where subgroups exchange values: there a large one costs few barriers.
const THREADS: usize = 256;
const MOST_THREADS: usize = 1024;
/// Elements that are read together.
const EIGHT: usize = 8;
/// Threads that exchange their sums.
const LANES: usize = 32;
/// Workgroups that keep a large GPU busy: of [`THREADS`], and of up to [`MOST_THREADS`].
const ENOUGH: [usize; 2] = [128, 96];
/// Threads that keep a large GPU busy, and those beyond which workgroups of half of [`MOST_THREADS`] do as well and wait less at their end.
const BUSY: usize = 132 * MOST_THREADS;
const BUSY_IN_HALVES: usize = 40 << 10;

/// How such a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Few {
    pub(super) rows: usize,
    /// Neighbours along k lie together in the right matrix.
    along_k: bool,
    /// Threads side by side along a row of the right matrix, or columns of a thread where those lie along k.
    across: usize,
    threads: usize,
    /// Where columns lie along k: the steps whose loads are on their way together.
    ahead: usize,
}

impl Few {
    /// For products of `p` with so many rows, in `batch` of them; `None` if it is none of these.
    pub(super) fn of(limits: Limits, p: &Product, rows: usize, batch: usize) -> Option<Few> {
        let along_k = p.b.row == 1 && p.b.column != 1;
        let (pitch, width) = if along_k { (p.b.column, p.k) } else { (p.b.row, p.n) };
        let together = p.a.column == 1 && (along_k || p.b.column == 1);
        let in_eights = [p.k, width, pitch, p.a_batch, p.b_batch, p.b_at].iter().all(|n| n.is_multiple_of(EIGHT));
        let begins = rows == 1 || p.a.row.is_multiple_of(EIGHT);
        if !(together && in_eights && begins && p.k > 0 && (1..=EIGHT).contains(&rows)) {
            return None;
        }
        let groups = |columns: usize| p.n.div_ceil(columns) * batch;
        if along_k {
            let most = if rows > 2 { 2 } else { 4 };
            let wide = |&c: &usize| c <= most && groups(THREADS / LANES * c) >= 2 * ENOUGH[0];
            let across = [4, 2].into_iter().find(wide).unwrap_or(1);
            // The sums of many rows take the registers.
            let loads = if rows > 4 { 4 } else { 8 };
            let ahead = (loads / across).min(p.k / (EIGHT * LANES)).max(1);
            // Few columns keep more of the device busy in small workgroups, which yet have 32 threads for each row.
            let mut threads = THREADS;
            while groups(threads / LANES * across) < ENOUGH[0] && threads > LANES * rows.next_power_of_two() {
                threads /= 2;
            }
            return Some(Few { rows, along_k, across, threads, ahead });
        }
        // As many threads as have something of k, where few workgroups are to keep the device busy; more rows leave room for fewer.
        let most = if limits.shuffles { limits.threads.min(MOST_THREADS) / rows.next_power_of_two() } else { THREADS };
        let most = most.max(THREADS);
        let large = most > THREADS;
        // A row of the right matrix is read in pieces of 64 bytes and more.
        let (enough, least) = if large { (ENOUGH[1], 4) } else { (ENOUGH[0], 2) };
        let wide = |&a: &usize| groups(EIGHT * a) >= enough && EIGHT * a * rows <= THREADS;
        let across = [8, 4].into_iter().find(wide).unwrap_or(least);
        let mut threads = (p.k / EIGHT * across).next_power_of_two().clamp(THREADS, most);
        while threads > THREADS && threads * groups(EIGHT * across) > BUSY {
            threads /= 2;
        }
        if threads == MOST_THREADS && threads * groups(EIGHT * across) > BUSY_IN_HALVES {
            threads /= 2;
        }
        Some(Few { rows, along_k, across, threads, ahead: 1 })
    }

    /// Threads of a workgroup.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Columns of a workgroup.
    pub(super) fn columns(&self) -> usize {
        if self.along_k { self.subgroups() * self.across } else { EIGHT * self.across }
    }

    /// Elements along k that a workgroup reads at once.
    pub(super) fn step(&self) -> usize {
        EIGHT * if self.along_k { LANES } else { self.threads / self.across }
    }

    fn subgroups(&self) -> usize {
        self.threads / LANES
    }

    /// Sums that a subgroup leaves.
    fn sums(&self) -> usize {
        self.rows * if self.along_k { self.across } else { self.columns() }
    }

    /// Whether its rows may be made by a node before it.
    pub(super) fn takes_lead(&self) -> bool {
        !self.along_k
    }

    /// The kernel of a file that says which product a workgroup has, whose rows `lead` makes, if there is one. Its factors are the buffers
    /// `a` and `b`, which are given as [`Shader::by_eight`]. What it lacks is `kernel(group, thread)`, which calls `product(group, thread)`.
    pub(super) fn kernel(&self, limits: Limits, name: &'static str, lead: Option<&Lead>) -> Shader {
        let (text, across) = if self.along_k { (self.along_k_text(), 1) } else { (self.across_text(), self.across) };
        let room = self.subgroups() * self.sums().next_multiple_of(EIGHT);
        let shader = Shader::file(limits, name, self.threads).with("eight").with("gemm_places").with("gemm_added");
        let shader = shader.folding(across, room).constant("TILE_ROWS", self.rows);
        lead::led(shader.constant("TILE_COLUMNS", self.columns()).declare(&text), lead)
    }

    /// The head of the kernel: a thread has at most one element of the result, and asks at once for what is added to it.
    fn begin(&self) -> String {
        let (columns, elements) = (self.columns(), self.rows * self.columns());
        format!(
            "fn product(group: vec3<u32>, thread: u32) {{\n    if (!place(group, thread)) {{ return; }}\n    \
             let my_row = row0 + thread / {columns}u;\n    let my_column = column0 + thread % {columns}u;\n    \
             let mine = select(NOWHERE, out_at(my_row, my_column), thread < {elements}u);\n    \
             var added = Added();\n    if (mine != NOWHERE) {{ added = added_to(mine, my_column); }}\n"
        )
    }

    /// The end of the kernel: `sum` is all that the subgroups have of the thread's element.
    fn end(sum: &str) -> String {
        format!(
            "    workgroupBarrier();\n    if (mine != NOWHERE) {{\n        var sum = 0.0f;\n{sum}        \
             leave_added(mine, sum, added);\n    }}\n}}\n"
        )
    }

    /// A thread has eight columns, and eight of k at a time; every row of the right matrix is that of `across` threads.
    fn across_text(&self) -> String {
        let across = self.across;
        let mut s = self.begin();
        // A column behind the last is read as the last ones, and not stored; a thread that has nothing of k reads what nobody takes. So loads
        // stand under no condition, which compilers do not take out of their way.
        let _ = writeln!(s, "    let column = min(column0 + thread % {across}u * 8u, p.n - 8u);");
        let _ = writeln!(s, "    let step = right_step();\n    var k = thread / {across}u * 8u;");
        s.push_str("    let begin = right_at(k, column);\n    var at = select(begin, 0u, begin == NOWHERE);\n");
        for r in 0..self.rows {
            let _ = writeln!(s, "    var even{r} = vec4<f32>();\n    var odd{r} = vec4<f32>();");
        }
        for i in 0..EIGHT {
            let _ = writeln!(s, "    var b{i} = raw_b(at + {i}u * step);");
        }
        // Nothing of the right matrix waits for what makes the rows.
        s.push_str("    prepare(group, thread);\n    if (begin != NOWHERE) {\n        loop {\n");
        for r in 0..self.rows {
            let _ = writeln!(s, "            let x{r} = left_eight({r}u, k);");
        }
        for i in 0..EIGHT {
            let of_x = format!("{}.{}", if i % 2 == 0 { "even" } else { "odd" }, ["x", "y", "z", "w"][i / 2]);
            let _ = writeln!(s, "            let f{i} = of_raw_b(b{i});");
            for r in 0..self.rows {
                for part in ["even", "odd"] {
                    let _ = writeln!(s, "            {part}{r} = fma(vec4<f32>(x{r}.{of_x}), f{i}.{part}, {part}{r});");
                }
            }
        }
        let step = self.step();
        let _ = writeln!(s, "            k += {step}u;\n            at += {step}u * step;");
        s.push_str("            if (k >= depth) { break; }\n");
        for i in 0..EIGHT {
            let _ = writeln!(s, "            b{i} = raw_b(at + {i}u * step);");
        }
        s.push_str("        }\n    }\n");
        let sums = self.sums();
        for r in 0..self.rows {
            let base = format!("thread / {LANES}u * {sums}u + {}u", r * self.columns());
            let _ = writeln!(s, "    fold_into(thread, {base}, even{r}, odd{r});");
        }
        // Elements of the thread's number lie at it, once for each subgroup.
        s.push_str(&Few::end(&format!(
            "        for (var i = 0u; i < {}u; i++) {{ sum += folded[i * {sums}u + thread]; }}\n",
            self.subgroups()
        )));
        s
    }

    /// 32 threads have `across` columns, and eight of k each at a time.
    fn along_k_text(&self) -> String {
        let across = self.across;
        let mut s = self.begin();
        let _ = writeln!(
            s,
            "    let first = column0 + thread / {LANES}u * {across}u;\n    var k = thread % {LANES}u * 8u;"
        );
        for c in 0..across {
            // A column behind the last is read as the last, and not stored.
            let _ = writeln!(s, "    let at{c} = right_at(0u, min(first + {c}u, p.n - 1u));");
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
        let (step, ahead) = (self.step(), self.ahead);
        if ahead > 1 {
            let _ = writeln!(s, "    for (; k + {}u < depth; k += {}u) {{", (ahead - 1) * step, ahead * step);
            steps(&mut s, ahead);
            s.push_str("    }\n");
        }
        let _ = writeln!(s, "    for (; k < depth; k += {step}u) {{");
        steps(&mut s, 1);
        s.push_str("    }\n");
        let sums: Vec<String> = (0..self.rows).flat_map(|r| (0..across).map(move |c| format!("sum{r}_{c}"))).collect();
        let room = sums.len().next_multiple_of(EIGHT);
        for (nth, eight) in sums.chunks(EIGHT).enumerate() {
            let four = |odd: usize| {
                let of =
                    |i: usize| eight.get(i).map_or("0.0f".into(), |v| format!("({v}.x + {v}.y) + ({v}.z + {v}.w)"));
                (0..EIGHT / 2).map(|i| of(2 * i + odd)).collect::<Vec<_>>().join(", ")
            };
            let base = format!("thread / {LANES}u * {room}u + {}u", nth * EIGHT);
            let _ = writeln!(s, "    fold_into(thread, {base}, vec4<f32>({}), vec4<f32>({}));", four(0), four(1));
        }
        let columns = self.columns();
        s.push_str(&Few::end(&format!(
            "        let mine_of_row = thread % {columns}u;\n        \
             sum = folded[mine_of_row / {across}u * {room}u + thread / {columns}u * {across}u + mine_of_row % {across}u];\n"
        )));
        s
    }
}

#[cfg(test)]
mod tests {
    use super::super::gemm::stored;
    use super::*;

    const CARD: Limits = Limits { threads: 1024, subgroup: 32, shuffles: true, ..Limits::LEAST };

    fn few(limits: Limits, rows: usize, [k, n]: [usize; 2], along_k: bool) -> Few {
        let b = if along_k { stored(k, true) } else { stored(n, false) };
        Few::of(limits, &Product::of(stored(k, false), b, rows, n, k), rows, 1).unwrap()
    }

    #[test]
    fn a_thread_has_at_most_one_element_and_its_subgroup_fits() {
        for limits in [Limits::LEAST, CARD] {
            for rows in 1..=8 {
                for shape in [[8, 8], [1024, 1024], [1024, 3072], [4096, 1024], [8192, 2048], [2048, 50_304]] {
                    for along_k in [false, true] {
                        let f = few(limits, rows, shape, along_k);
                        assert!(f.rows * f.columns() <= f.threads && f.threads <= limits.threads, "{shape:?} {f:?}");
                        let room = f.subgroups() * f.sums().next_multiple_of(EIGHT);
                        let exchange = if limits.shuffles { 0 } else { 16 * f.threads };
                        assert!(4 * room + exchange <= limits.shared, "{shape:?} {f:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_workgroups_have_many_threads() {
        let of = |k, n| {
            let f = few(CARD, 1, [k, n], false);
            (n.div_ceil(f.columns()), f.threads)
        };
        assert_eq!([of(1024, 1024), of(4096, 1024), of(1024, 3072)], [(32, 512), (32, 1024), (96, 512)]);
        assert_eq!([of(1024, 4096), of(8192, 2048), of(2048, 8192)], [(128, 512), (64, 512), (128, 512)]);
    }
}
