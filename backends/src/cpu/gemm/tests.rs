//! Against naive f64 loops, and bit for bit across threads, groupings, layouts and kernels.

use std::sync::Mutex;

use half::{bf16, f16};

use super::kernel::{self, Isa};
use super::*;
use crate::cpu::crew::Crew;

/// xorshift; the tests need no better.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }
    fn value(&mut self) -> f64 {
        self.below(20001) as f64 / 10000.0 - 1.0
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
    /// Offsets of `e` segments over at most `s` rows, some empty.
    fn offsets(&mut self, e: usize, s: usize) -> Vec<i32> {
        let mut offsets: Vec<i32> = (0..e).map(|_| self.below(s + 1) as i32).collect();
        if e > 2 {
            offsets[1] = offsets[0];
        }
        offsets.push(0);
        offsets.sort();
        offsets
    }
}

/// Memory of one storage type, aligned as f32.
#[derive(Clone)]
struct Memory {
    storage: Storage,
    words: Vec<u32>,
}

impl Memory {
    fn new(storage: Storage, len: usize, mut value: impl FnMut() -> f64) -> Self {
        let mut memory = Memory { storage, words: vec![0; (len * storage.bytes()).div_ceil(4)] };
        (0..len).for_each(|i| memory.set(i, value()));
        memory
    }
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }
    fn get(&self, i: usize) -> f64 {
        assert!(i * self.storage.bytes() < self.words.len() * 4);
        // SAFETY: within the memory.
        unsafe { Self::read(self.words.as_ptr().cast(), self.storage, i) }
    }
    /// Element `i` of memory that begins at `data`.
    unsafe fn read(data: *const u8, storage: Storage, i: usize) -> f64 {
        // SAFETY: the caller's pointer reaches the element.
        unsafe {
            match storage {
                Storage::F32 => f64::from(*data.cast::<f32>().add(i)),
                Storage::Bf16 => (*data.cast::<bf16>().add(i)).to_f64(),
                Storage::F16 => (*data.cast::<f16>().add(i)).to_f64(),
            }
        }
    }
    fn set(&mut self, i: usize, value: f64) {
        match self.storage {
            Storage::F32 => self.words[i] = (value as f32).to_bits(),
            Storage::Bf16 => bytemuck::cast_slice_mut::<_, bf16>(&mut self.words)[i] = bf16::from_f32(value as f32),
            Storage::F16 => bytemuck::cast_slice_mut::<_, f16>(&mut self.words)[i] = f16::from_f32(value as f32),
        }
    }
    fn mat(&self, (row_stride, col_stride): (usize, usize)) -> Mat {
        Mat {
            data: self.words.as_ptr().cast(),
            storage: self.storage,
            row_stride: row_stride as isize,
            col_stride: col_stride as isize,
        }
    }
    fn mat_mut(&mut self, (row_stride, col_stride): (usize, usize)) -> MatMut {
        MatMut {
            data: self.words.as_mut_ptr().cast(),
            storage: self.storage,
            row_stride: row_stride as isize,
            col_stride: col_stride as isize,
        }
    }
}

/// Strides of a matrix, and the elements it spans.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Rows,
    Columns,
    Padded,
    Spread,
}

impl Layout {
    fn strides(self, rows: usize, cols: usize) -> ((usize, usize), usize) {
        let strides = match self {
            Layout::Rows => (cols, 1),
            Layout::Columns => (1, rows),
            Layout::Padded => (cols + 3, 1),
            Layout::Spread => (3 * cols + 1, 3),
        };
        (strides, rows * strides.0.max(1) + cols * strides.1.max(1) + 8)
    }
}

#[derive(Clone, Debug)]
enum Kind {
    One,
    Strided(usize, usize),
    Rows(Vec<i32>),
    Inner(Vec<i32>),
}

#[derive(Clone, Debug)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    kind: Kind,
    storages: [Storage; 4],
    layouts: [Layout; 3],
    gather: bool,
    accumulate: bool,
    bias: bool,
    finished: bool,
    seed: u64,
}

const ALL: [Storage; 3] = [Storage::F32, Storage::Bf16, Storage::F16];

impl Case {
    fn plain(m: usize, n: usize, k: usize) -> Self {
        Case {
            m,
            n,
            k,
            kind: Kind::One,
            storages: [Storage::F32; 4],
            layouts: [Layout::Rows; 3],
            gather: false,
            accumulate: false,
            bias: false,
            finished: false,
            seed: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Runs the case, checks it against the oracle and returns C's bytes.
    fn check(&self, isa: &'static Isa, threads: usize) -> Vec<u8> {
        let (c, wanted, slack) = self.run(isa, threads);
        for (i, (want, slack)) in wanted.iter().zip(&slack).enumerate() {
            let got = c.get(i);
            if want.is_nan() {
                assert!(got.is_nan(), "{}: wrote {got} outside C at {i}: {self:?}", isa.name);
                continue;
            }
            assert!((got - want).abs() <= *slack, "{} at {i}: {got} for {want} (+-{slack}): {self:?}", isa.name);
        }
        c.bytes().to_vec()
    }

    fn run(&self, isa: &'static Isa, threads: usize) -> (Memory, Vec<f64>, Vec<f64>) {
        let Case { m, n, k, .. } = *self;
        let mut random = Random(self.seed);
        let problems = match &self.kind {
            Kind::One => 1,
            Kind::Strided(x, y) => x * y,
            Kind::Rows(offsets) | Kind::Inner(offsets) => offsets.len() - 1,
        };
        let k_grouped = matches!(self.kind, Kind::Inner(_));
        let m_grouped = matches!(self.kind, Kind::Rows(_));
        // With a list, A has some rows more than are used and in another order.
        let listed = if k_grouped { k } else { m };
        let source_rows = listed + 5;
        let list: Vec<i32> = (0..listed).map(|_| random.below(source_rows + 1) as i32 - 1).collect();
        let (a_rows, a_cols) = match (self.gather, k_grouped) {
            (false, _) => (m, k),
            (true, false) => (source_rows, k),
            (true, true) => (m, source_rows),
        };
        let (a_strides, a_span) = self.layouts[0].strides(a_rows, a_cols);
        let (b_strides, b_span) = self.layouts[1].strides(k, n);
        let (c_strides, c_span) = self.layouts[2].strides(m, n);
        let a = Memory::new(self.storages[0], a_span * problems, || random.value());
        let b = Memory::new(self.storages[1], b_span * problems, || random.value());
        let bias = Memory::new(self.storages[3], n * problems, || random.value());
        let poison = self.accumulate;
        let mut c = Memory::new(self.storages[2], c_span * problems.max(1), || if poison { 0.5 } else { f64::NAN });
        let mut wanted: Vec<f64> = vec![f64::NAN; c_span * problems.max(1)];
        let mut slack = vec![0.0; wanted.len()];
        if poison {
            wanted.fill(0.5);
        }
        let unit = match self.storages[2] {
            Storage::F32 => 2f64.powi(-24),
            Storage::Bf16 => 2f64.powi(-8),
            Storage::F16 => 2f64.powi(-11),
        };
        for p in 0..problems {
            let (rows, steps) = match &self.kind {
                Kind::One | Kind::Strided(..) => (0..m, 0..k),
                Kind::Rows(offsets) => (offsets[p] as usize..offsets[p + 1] as usize, 0..k),
                Kind::Inner(offsets) => (0..m, offsets[p] as usize..offsets[p + 1] as usize),
            };
            let strided = matches!(self.kind, Kind::Strided(..));
            for i in rows {
                for j in 0..n {
                    let c_base = if m_grouped { 0 } else { p * c_span };
                    let at = c_base + i * c_strides.0 + j * c_strides.1;
                    let mut sum = if self.accumulate { c.get(at) } else { 0.0 };
                    let mut size = sum.abs();
                    for s in steps.clone() {
                        let (mut row, mut col) = (i as i32, s as i32);
                        if self.gather && k_grouped {
                            col = list[s];
                        } else if self.gather {
                            row = list[i];
                        }
                        if row < 0 || col < 0 {
                            continue;
                        }
                        let a_base = if strided { p * a_span } else { 0 };
                        let b_base = if strided || m_grouped { p * b_span } else { 0 };
                        let x = a.get(a_base + row as usize * a_strides.0 + col as usize * a_strides.1)
                            * b.get(b_base + s * b_strides.0 + j * b_strides.1);
                        sum += x;
                        size += x.abs();
                    }
                    if self.bias {
                        sum += bias.get(p * n + j);
                        size += 1.0;
                    }
                    wanted[at] = sum;
                    slack[at] = sum.abs() * unit * 1.001 + size * 2f64.powi(-24) * (steps.len() as f64 + 3.0) + 1e-7;
                }
            }
        }
        if let (Kind::Rows(offsets), false) = (&self.kind, self.accumulate) {
            for i in *offsets.last().unwrap() as usize..m {
                (0..n).for_each(|j| wanted[i * c_strides.0 + j * c_strides.1] = 0.0);
            }
        }
        let step = |span: usize, y: usize| [(span * y) as isize, span as isize];
        // Every element is in one part, and holds its last value by then.
        let (address, c_storage) = (c.words.as_mut_ptr() as usize, c.storage);
        let seen = Mutex::new(vec![None; wanted.len()]);
        let finished = |part: Part| {
            let base = if m_grouped { 0 } else { part.problem * c_span };
            for (i, j) in part.rows.flat_map(|i| part.cols.clone().map(move |j| (i, j))) {
                let at = base + i * c_strides.0 + j * c_strides.1;
                // SAFETY: an element of C, which nobody writes any more.
                let value = unsafe { Memory::read(address as *const u8, c_storage, at) };
                assert!(seen.lock().unwrap()[at].replace(value.to_bits()).is_none(), "({i}, {j}) twice");
            }
        };
        let gemm = Gemm {
            batch: match &self.kind {
                Kind::One => Batch::One,
                Kind::Strided(x, y) => {
                    Batch::Strided { counts: [*x, *y], a: step(a_span, *y), b: step(b_span, *y), c: step(c_span, *y) }
                }
                Kind::Rows(offsets) => Batch::MGrouped { offsets, b: b_span as isize },
                Kind::Inner(offsets) => Batch::KGrouped { offsets, c: c_span as isize },
            },
            gather: self.gather.then_some(Gather { rows: &list, source_rows }),
            accumulate: self.accumulate,
            bias: self.bias.then_some(Bias {
                data: bias.words.as_ptr().cast(),
                storage: bias.storage,
                step: n as isize,
            }),
            finished: if self.finished { Some(&finished) } else { None },
            ..Gemm::new(m, n, k, a.mat(a_strides), b.mat(b_strides), c.mat_mut(c_strides))
        };
        let size = drive::workspace_bytes(isa, m, n, k, self.storages[2], threads);
        // Fences around the workspace, and an address of no particular alignment.
        let mut workspace = vec![0xa5u8; size + 71];
        // SAFETY: all operands were sized by their spans.
        unsafe { drive::run(isa, &gemm, &mut workspace[7..7 + size], threads) }.unwrap();
        if self.finished {
            for (at, (seen, want)) in seen.into_inner().unwrap().into_iter().zip(&wanted).enumerate() {
                // With no rows in the last segment there is nothing to tell of them when accumulating: they stay.
                let told = seen.map(f64::from_bits);
                assert!(told.is_none() || told == Some(c.get(at)), "{at}: told {told:?} of {}: {self:?}", c.get(at));
                assert!(told.is_some() || want.is_nan() || self.accumulate, "{at} is not told: {self:?}");
            }
        }
        assert!(workspace[..7].iter().chain(&workspace[7 + size..]).all(|&byte| byte == 0xa5), "{self:?}");
        (c, wanted, slack)
    }

    fn random(random: &mut Random) -> Self {
        let layouts = [Layout::Rows, Layout::Columns, Layout::Padded, Layout::Spread];
        let kind = random.below(4);
        let side = |random: &mut Random| match random.below(4) {
            0 => random.below(4),
            1 => random.below(20),
            2 => 16 * random.below(5),
            _ => random.below(70),
        };
        let (m, n, mut k) = (side(random), side(random), side(random));
        if random.below(6) == 0 {
            k += 300 + random.below(300);
        }
        let experts = 1 + random.below(6);
        Case {
            m,
            n,
            k,
            kind: match kind {
                0 => Kind::One,
                1 => Kind::Strided(1 + random.below(2), random.below(4)),
                2 => Kind::Rows(random.offsets(experts, m)),
                _ => Kind::Inner(random.offsets(experts, k)),
            },
            storages: [random.pick(&ALL), random.pick(&ALL), random.pick(&ALL), random.pick(&ALL)],
            layouts: [random.pick(&layouts), random.pick(&layouts), random.pick(&layouts)],
            gather: random.below(3) == 0,
            accumulate: random.below(3) == 0,
            bias: random.below(3) == 0,
            finished: random.below(3) == 0,
            seed: random.next(),
        }
    }
}

#[test]
fn random_cases_match_the_oracle_on_every_instruction_set() {
    let mut random = Random(77);
    for _ in 0..350 {
        let case = Case::random(&mut random);
        for isa in kernel::available() {
            case.check(isa, 1);
        }
    }
}

#[test]
fn sizes_around_the_blocks_match_the_oracle() {
    for m in [1, 13, 14, 15, 29, 256, 257, 300] {
        for (n, k) in [(31, 70), (32, 256), (129, 257), (300, 32)] {
            let mut case = Case::plain(m, n, k);
            let [all] = [kernel::best()];
            case.check(all, 1);
            case.layouts = [Layout::Columns, Layout::Columns, Layout::Rows];
            case.storages = [Storage::F32, Storage::Bf16, Storage::Bf16, Storage::F32];
            case.check(all, 2);
        }
    }
}

#[test]
fn a_b_that_is_packed_whole_matches_the_oracle_on_every_instruction_set() {
    for (n, k) in [(1, 1), (96, 256), (200, 300), (130, 700)] {
        for isa in kernel::available() {
            let mut case = Case { gather: true, bias: true, finished: true, ..Case::plain(230, n, k) };
            case.check(isa, 2);
            case = Case {
                accumulate: true,
                finished: true,
                layouts: [Layout::Columns, Layout::Columns, Layout::Rows],
                ..Case::plain(250, n, k)
            };
            case.check(isa, 1);
            // Sums beside C, and a C of whatever strides.
            case.storages = [Storage::Bf16, Storage::F32, Storage::Bf16, Storage::F16];
            case.layouts = [Layout::Spread, Layout::Padded, Layout::Spread];
            case.check(isa, 3);
        }
    }
}

#[test]
fn an_a_too_long_to_pack_whole_still_fits_the_workspace() {
    for m in [7, 14] {
        Case::plain(m, 300, 18_000).check(kernel::best(), 1);
    }
}

#[test]
fn every_instruction_set_with_fma_gives_the_same_bits() {
    let mut random = Random(5);
    let fused: Vec<_> = kernel::available().filter(|isa| isa.name != "portable" && isa.matrix.is_none()).collect();
    for _ in 0..100 {
        let case = Case::random(&mut random);
        let bits: Vec<_> = fused.iter().map(|isa| case.run(isa, 1).0.words).collect();
        assert!(bits.windows(2).all(|pair| pair[0] == pair[1]), "{case:?}");
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let offsets = vec![0, 0, 3, 200, 200, 231, 232];
    let mut cases = vec![Case::plain(300, 520, 300), Case::plain(3, 1024, 1100), Case::plain(70, 260, 1000)];
    cases.push(Case { kind: Kind::Rows(offsets.clone()), gather: true, ..Case::plain(240, 300, 300) });
    cases.push(Case { kind: Kind::Inner(offsets), layouts: [Layout::Columns; 3], ..Case::plain(300, 200, 240) });
    cases[1].storages = [Storage::Bf16; 4];
    cases[2].storages = [Storage::F32, Storage::F32, Storage::F16, Storage::F32];
    for case in cases {
        let alone = case.check(kernel::best(), 1);
        for threads in 1..=3 {
            let crew = Crew::new(threads).unwrap();
            assert!(crew.lead(|| case.check(kernel::best(), threads)) == alone, "{threads} threads: {case:?}");
        }
    }
}

/// Multiplies rows `from..to` of `a` alone.
fn rows_alone(isa: &'static Isa, a: &Memory, b: Mat, from: usize, to: usize, n: usize, k: usize) -> Vec<u32> {
    let mut c = Memory::new(Storage::F32, (to - from) * n, || f64::NAN);
    let gemm = Gemm::new(to - from, n, k, a.mat((k, 1)).from(from as isize, 0), b, c.mat_mut((n, 1)));
    let mut workspace = vec![0; drive::workspace_bytes(isa, to - from, n, k, Storage::F32, 1)];
    // SAFETY: all operands have these sizes.
    unsafe { drive::run(isa, &gemm, &mut workspace, 1) }.unwrap();
    c.words
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let (m, n, k) = (300, 530, 700);
    let mut random = Random(3);
    for storage in ALL {
        let a = Memory::new(storage, m * k, || random.value());
        let b = Memory::new(storage, k * n, || random.value());
        for isa in kernel::available() {
            for strides in [(n, 1), (1, k)] {
                let b = b.mat(strides);
                let all = rows_alone(isa, &a, b, 0, m, n, k);
                // A matrix unit is for calls of many rows, whichever of them are in use.
                let least = if isa.matrix.is_some() { isa.mr() + 1 } else { 1 };
                let parts = [(0, 1), (7, 9), (100, 103), (40, 46), (31, 45), (60, 75), (200, 270), (299, 300)];
                for (from, to) in parts.into_iter().filter(|(from, to)| to - from >= least) {
                    let part = rows_alone(isa, &a, b, from, to, n, k);
                    assert!(part == all[from * n..to * n], "{} {storage:?} {strides:?} {from}..{to}", isa.name);
                }
            }
        }
    }
}

#[test]
fn segments_give_the_bits_of_plain_matmuls() {
    let (n, k, offsets) = (96, 300, [0, 40, 40, 41, 90]);
    let mut random = Random(11);
    let a = Memory::new(Storage::F32, 90 * k, || random.value());
    let b = Memory::new(Storage::F32, 4 * k * n, || random.value());
    // A matrix unit is for calls of many rows: its own tests have this one.
    for isa in kernel::available().filter(|isa| isa.matrix.is_none()) {
        let mut c = Memory::new(Storage::F32, 90 * n, || f64::NAN);
        let gemm = Gemm {
            batch: Batch::MGrouped { offsets: &offsets, b: (k * n) as isize },
            ..Gemm::new(90, n, k, a.mat((k, 1)), b.mat((n, 1)), c.mat_mut((n, 1)))
        };
        let mut workspace = vec![0; drive::workspace_bytes(isa, 90, n, k, Storage::F32, 2)];
        // SAFETY: all operands have these sizes.
        unsafe { drive::run(isa, &gemm, &mut workspace, 2) }.unwrap();
        for e in 0..4 {
            let (from, to) = (offsets[e] as usize, offsets[e + 1] as usize);
            let alone = rows_alone(isa, &a, b.mat((n, 1)).from((e * k) as isize, 0), from, to, n, k);
            assert!(alone == c.words[from * n..to * n], "expert {e}");
        }
    }
}

#[test]
fn all_rows_to_one_expert_and_none_to_the_others() {
    for e in 0..4 {
        let offsets: Vec<i32> = (0..=4).map(|i| if i > e { 120 } else { 0 }).collect();
        Case { kind: Kind::Rows(offsets.clone()), ..Case::plain(120, 64, 48) }.check(kernel::best(), 2);
        Case { kind: Kind::Inner(offsets), ..Case::plain(48, 64, 120) }.check(kernel::best(), 2);
    }
}

#[test]
fn nan_and_infinity_reach_only_their_row() {
    let (m, n, k) = (30, 40, 20);
    let mut a = Memory::new(Storage::Bf16, m * k, || 1.0);
    a.set(17 * k + 3, f64::NAN);
    a.set(4 * k + 3, f64::INFINITY);
    let b = Memory::new(Storage::Bf16, n * k, || 1.0);
    let mut c = Memory::new(Storage::Bf16, m * n, || f64::NAN);
    let gemm = Gemm::new(m, n, k, a.mat((k, 1)), b.mat((n, 1)), c.mat_mut((n, 1)));
    // SAFETY: all operands have these sizes.
    unsafe { gemm_seq(&gemm, &mut vec![0; workspace_bytes(m, n, k, Storage::Bf16, 1)]) }.unwrap();
    for i in 0..m {
        for j in 0..n {
            let got = c.get(i * n + j);
            assert!(
                if i == 17 { got.is_nan() } else { got == if i == 4 { f64::INFINITY } else { 20.0 } },
                "{i} {j} {got}"
            );
        }
    }
}

#[test]
fn bad_input_is_refused_and_nothing_written() {
    let a = Memory::new(Storage::F32, 64, || 1.0);
    let mut c = Memory::new(Storage::F32, 64, || 7.0);
    let whole = Gemm::new(4, 4, 4, a.mat((4, 1)), a.mat((4, 1)), c.mat_mut((4, 1)));
    let mut workspace = vec![0; workspace_bytes(4, 4, 4, Storage::F32, 1)];
    // SAFETY: refused before anything is touched.
    let mut refuse = |gemm: Gemm<'_>| unsafe { super::gemm(&gemm, &mut workspace) }.unwrap_err();
    let grouped = |offsets| Gemm { batch: Batch::MGrouped { offsets, b: 16 }, ..whole };
    let inner = |offsets| Gemm { batch: Batch::KGrouped { offsets, c: 16 }, ..whole };
    assert_eq!(refuse(grouped(&[])), GemmError::NoOffsets);
    assert_eq!(refuse(grouped(&[1, 4])), GemmError::Offsets { index: 0, found: 1, bound: 4 });
    assert_eq!(refuse(grouped(&[0, 3, 2])), GemmError::Offsets { index: 2, found: 2, bound: 4 });
    assert_eq!(refuse(inner(&[0, 5])), GemmError::Offsets { index: 1, found: 5, bound: 4 });
    assert_eq!(refuse(inner(&[0, -1])), GemmError::Offsets { index: 1, found: -1, bound: 4 });
    let through = |rows| Gemm { gather: Some(Gather { rows, source_rows: 4 }), ..whole };
    assert_eq!(refuse(through(&[0, 1, 2])), GemmError::GatherLength { wanted: 4, found: 3 });
    assert_eq!(refuse(through(&[0, -1, 2, 4])), GemmError::GatherRow { index: 3, found: 4, rows: 4 });
    assert_eq!(refuse(through(&[0, -2, 2, 3])), GemmError::GatherRow { index: 1, found: -2, rows: 4 });
    // SAFETY: refused before anything is touched.
    let short = unsafe { super::gemm(&whole, &mut [0; 100]) }.unwrap_err();
    assert!(matches!(short, GemmError::Workspace { found: 100, wanted } if wanted > 100));
    assert!((0..64).all(|i| c.get(i) == 7.0));
}

#[test]
fn an_instruction_set_is_chosen_by_its_name() {
    let first = kernel::available().next().unwrap();
    let chosen = kernel::choose(None).unwrap();
    assert_eq!(chosen.name, kernel::available().find(|isa| isa.matrix.is_none()).unwrap().name);
    for isa in kernel::available() {
        assert_eq!(kernel::choose(Some(isa.name)).unwrap().name, isa.name);
    }
    let there = kernel::choose(Some("sse9")).err().unwrap();
    assert_eq!((there[0], *there.last().unwrap()), (first.name, "portable"));
}
