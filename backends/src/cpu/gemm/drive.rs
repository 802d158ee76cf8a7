//! Blocking: the batch becomes tasks (blocks of C), threads draw tasks, a task runs tiles.

use super::kernel::{Isa, KC, MAX_TILE, ROW};
use super::matrix::{self, MAX_PARTS, Matrix, SIDE, SplitB, parts};
use super::pack::{ArgsB, GROUP, STAGE};
use super::problem;
use super::task::{Packed, Task};
use super::{Batch, Gemm, GemmError, Mat, Storage};
use crate::cpu::crew::{share, share_with};

/// Alignment of everything in the workspace: a cache line, and a vector of AVX-512.
pub(super) const ALIGN: usize = 64;
/// Rows of C in the largest task.
const MAX_ROWS: usize = 256;
/// Columns of C in the largest task. A packed block of B (256 KiB) stays in L2.
const MAX_COLS: usize = 256;
/// The same on a matrix unit, which is so fast that splitting A for each block of columns would count (768 KiB of parts).
const MATRIX_COLS: usize = 512;
/// Blocks are not cut below this: packing would cost more than balance gains, and a wide kernel needs the columns.
const MIN_ROWS: usize = 64;
const MIN_COLS: usize = 128;
/// Tasks per thread to aim at: more would make the last ones to finish shorter, but pack every operand more often.
const TASKS_PER_THREAD: usize = 4;
/// The same when each thread gets as many as the others: what is left is a thread that was held up.
const EVEN_TASKS_PER_THREAD: usize = 2;
/// The same when all are strips: those read the longer runs of memory the wider they are.
const STRIPS_PER_THREAD: usize = 1;
/// Columns of the largest strip task (one tile of rows): whole pages of B's rows, while the sums stay in L1 or L2.
const STRIP_COLS: usize = 4096;
/// Most floats of A packed whole for a strip task (half of L2).
const STRIP_A: usize = 128 * 1024;
/// Rows of A packed together.
const GROUP_ROWS: usize = 56;
/// Most floats of a B that is packed whole, once for all tasks (1 MiB): larger ones would leave L2 before they are
/// used.
const WHOLE_B: usize = 256 * 1024;
/// Rows of a task over a whole B, with all columns: two groups, each of which is packed once.
const WHOLE_ROWS: usize = 2 * GROUP_ROWS;
/// The same on a matrix unit.
const MATRIX_WHOLE_ROWS: usize = 4 * SIDE;
/// Tasks per thread to aim at over a whole B. More than else, as a task packs nothing that others pack too.
const WHOLE_TASKS_PER_THREAD: usize = 4;
/// Columns of a whole B that are packed at once.
const WHOLE_COLS: usize = 128;
/// Below this estimate of time on one thread, waking others costs more than they give.
const SHARE_NS: usize = 8_000;
/// For the estimate: flops and bytes one core gets through per nanosecond.
const FLOPS_PER_NS: usize = 80;
const BYTES_PER_NS: usize = 16;

/// One thread's part of the workspace.
pub(super) struct Scratch {
    /// Offsets in bytes of what follows the panels of A.
    pub(super) b: usize,
    pub(super) sums: usize,
    pub(super) tile: usize,
    pub(super) stage: usize,
    /// Size in bytes, a multiple of [`ALIGN`].
    pub(super) bytes: usize,
}

/// Steps of k per packed block: equal parts of at most KC.
pub(super) fn chunks(k: usize) -> (usize, usize) {
    let count = k.div_ceil(KC).max(1);
    let step = k.div_ceil(count).next_multiple_of(matrix::STEP);
    (k.div_ceil(step.max(1)).max(1), step)
}

/// Floats from one packed panel of B to the next. The odd cache lines keep panels off each other's L1 sets.
pub(super) fn panel_step(isa: &Isa, k: usize) -> usize {
    k.min(KC) * isa.nr() + 32
}

/// Floats from one packed tile of A to the next.
pub(super) fn tile_step(isa: &Isa) -> usize {
    // The odd cache line keeps the tiles of one step of k, written together, off each other's L1 sets.
    (isa.mr() * ROW).max(KC * isa.col + 16)
}

/// Tiles of A packed together for blocks of `rows` rows: enough that a k-wise A is read in whole cache lines, few enough
/// to leave room in L2 for the block of B.
pub(super) fn group_tiles(isa: &Isa, rows: usize) -> usize {
    rows.div_ceil(isa.mr()).clamp(1, (GROUP_ROWS / isa.mr()).clamp(1, GROUP))
}

/// Floats of A that a strip task of `rows` rows packs.
fn strip_a(rows: usize, k: usize) -> usize {
    chunks(k).0 * rows * ROW
}

/// The matrix unit for calls of this static shape, if the instruction set has one and it is worth it.
fn unit(isa: &Isa, m: usize, n: usize, k: usize) -> Option<&'static Matrix> {
    isa.matrix.filter(|_| matrix::suits(m, n, k, isa.mr()))
}

/// Bytes from one packed panel of B to the next, for blocks of `k` steps.
fn panel_bytes(isa: &Isa, unit: bool, k: usize) -> usize {
    if unit { matrix::panel_bytes(k.min(KC), MAX_PARTS) } else { panel_step(isa, k) * size_of::<f32>() }
}

/// Bytes of workspace for `threads` threads and problems of at most this size.
pub(super) fn workspace_bytes(isa: &Isa, m: usize, n: usize, k: usize, c: Storage, threads: usize) -> usize {
    let bytes =
        |unit| whole_bytes(isa, unit, m, n, k) + Scratch::new(isa, unit, m, n, k, c).bytes * threads.max(1) + ALIGN;
    // A smaller problem may run without the unit.
    if unit(isa, m, n, k).is_some() { bytes(true).max(bytes(false)) } else { bytes(false) }
}

/// Bytes of the workspace before the threads' parts: those of a B that is packed whole; 0 if it is packed block by block,
/// because it is large or few rows use it.
fn whole_bytes(isa: &Isa, unit: bool, m: usize, n: usize, k: usize) -> usize {
    if k == 0 || m < 2 * WHOLE_ROWS || n.saturating_mul(k) > WHOLE_B {
        return 0;
    }
    let (count, step) = chunks(k);
    (count * n.div_ceil(isa.nr()) * panel_bytes(isa, unit, step)).next_multiple_of(ALIGN)
}

/// Whether sums must be kept aside between blocks of k, because C cannot hold them exactly.
pub(super) fn sums_aside(c: Storage, k: usize) -> bool {
    c != Storage::F32 && k > KC
}

impl Scratch {
    /// The layout for problems of at most this size, on the matrix unit or not.
    pub(super) fn new(isa: &Isa, unit: bool, m: usize, n: usize, k: usize, c: Storage) -> Self {
        let padded = n.next_multiple_of(isa.nr());
        let cols = padded.min(if unit { MATRIX_COLS } else { MAX_COLS });
        let mut end = 0;
        let mut part = |bytes: usize| {
            let start = end;
            end += bytes.next_multiple_of(ALIGN);
            start
        };
        let float = size_of::<f32>();
        let strip_sums = if unit { 0 } else { m.min(isa.mr()) * padded.min(STRIP_COLS) };
        if unit {
            part(matrix::panel_bytes(k.min(KC), MAX_PARTS));
        } else {
            let strip = strip_a(m.min(isa.mr()), k).min(STRIP_A);
            part(strip.max(group_tiles(isa, m) * tile_step(isa)) * float);
        }
        let b = part(cols / isa.nr() * panel_bytes(isa, unit, k));
        let sums = if sums_aside(c, k) { m.min(MAX_ROWS) * cols } else { 0 };
        let (sums, tile) = (part(sums.max(strip_sums) * float), part(MAX_TILE * float));
        // For the unit, a panel of B in f32 follows.
        let stage = part((STAGE + if unit { panel_step(isa, k) } else { 0 }) * float);
        Scratch { b, sums, tile, stage, bytes: end }
    }
}

/// What all threads share.
struct Shared<'a> {
    isa: &'static Isa,
    /// The matrix unit, if the call runs on it.
    unit: Option<&'static Matrix>,
    gemm: &'a Gemm<'a>,
    layout: Scratch,
    workspace: *mut u8,
    cut: Cut,
    /// Where B is packed whole, if it is.
    whole: Option<*mut u8>,
}

// SAFETY: the pointers are read only, but for C and the workspace: tasks write disjoint blocks of C (each is drawn
// once), and each thread its own part of the workspace.
unsafe impl Sync for Shared<'_> {}

/// How problems are cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    /// Rows of C up to which a task is a strip.
    strip: usize,
    /// Most rows and columns of a block.
    rows: usize,
    cols: usize,
    /// Most columns of a strip.
    strip_cols: usize,
}

impl Cut {
    /// Columns of a task of a problem of `m` rows.
    fn cols(&self, m: usize) -> usize {
        if m <= self.strip { self.strip_cols } else { self.cols }
    }

    /// Tasks of one problem: down the rows, and across the columns.
    fn one(&self, m: usize, n: usize) -> (usize, usize) {
        (m.div_ceil(self.rows), n.div_ceil(self.cols(m)))
    }

    /// Tasks of all problems together.
    fn all(&self, gemm: &Gemm<'_>) -> usize {
        let tasks = |m: usize| {
            let (down, across) = self.one(m, gemm.n);
            down * across
        };
        match gemm.batch {
            Batch::One | Batch::Strided { .. } | Batch::KGrouped { .. } => problem::count(gemm) * tasks(gemm.m),
            Batch::MGrouped { .. } => (0..problem::count(gemm)).map(|p| tasks(problem::size(gemm, p).0)).sum(),
        }
    }

    /// Smaller tasks, if they still are worth it. Columns are cut into a few more equal parts if there are any, else in
    /// half.
    fn finer(&self, isa: &Isa, m: usize, n: usize) -> Option<Self> {
        let halve_cols = self.cols > MIN_COLS && (self.cols >= self.rows || m <= self.rows / 2);
        if !halve_cols && self.rows <= MIN_ROWS && self.strip_cols <= MIN_COLS {
            return None;
        }
        let parts = n.div_ceil(self.cols);
        let equal = (parts + 1..2 * parts).find(|&parts| n.is_multiple_of(parts * isa.nr()) && n / parts >= MIN_COLS);
        // Whole panels: tasks begin where a panel of a B that is packed whole does.
        let narrower = equal.map_or((self.cols / 2).next_multiple_of(isa.nr()), |parts| n / parts);
        Some(Cut {
            cols: if halve_cols { narrower } else { self.cols },
            rows: if halve_cols { self.rows } else { (self.rows / 2).max(MIN_ROWS) },
            strip_cols: (self.strip_cols / 2).max(MIN_COLS),
            ..*self
        })
    }
}

/// About how long the batch takes on one thread, in nanoseconds.
fn estimate(gemm: &Gemm<'_>) -> usize {
    let (mut flops, mut bytes) = (0usize, 0usize);
    for p in 0..problem::count(gemm) {
        let (m, k) = problem::size(gemm, p);
        if m > 0 {
            flops = flops.saturating_add(2 * m * gemm.n * k);
            bytes += gemm.n * k * gemm.b.storage.bytes() + m * gemm.n * gemm.c.storage.bytes();
        }
        if flops / FLOPS_PER_NS + bytes / BYTES_PER_NS > SHARE_NS {
            break;
        }
    }
    flops / FLOPS_PER_NS + bytes / BYTES_PER_NS
}

/// Runs a batch with these kernels on at most `threads` threads of the crew.
///
/// # Safety
/// As [`super::gemm`]; the machine has the instruction set.
pub(super) unsafe fn run(
    isa: &'static Isa,
    gemm: &Gemm<'_>,
    workspace: &mut [u8],
    threads: usize,
) -> Result<(), GemmError> {
    problem::check(gemm)?;
    // A sum that is not finite is computed again on the unit, so C must not hold what it is added to.
    let unit = unit(isa, gemm.m, gemm.n, gemm.k).filter(|_| !gemm.accumulate);
    let layout = Scratch::new(isa, unit.is_some(), gemm.m, gemm.n, gemm.k, gemm.c.storage);
    let skip = workspace.as_ptr().align_offset(ALIGN);
    let parts = |before: usize| workspace.len().saturating_sub(before) / layout.bytes;
    let whole = match gemm.batch {
        Batch::One => whole_bytes(isa, unit.is_some(), gemm.m, gemm.n, gemm.k),
        Batch::Strided { .. } | Batch::MGrouped { .. } | Batch::KGrouped { .. } => 0,
    };
    // Threads come first where the workspace is that of another problem.
    let whole = if parts(skip + whole) >= threads { whole } else { 0 };
    let room = parts(skip + whole);
    if room == 0 {
        return Err(GemmError::Workspace { wanted: layout.bytes + ALIGN, found: workspace.len() });
    }
    if gemm.m == 0 || gemm.n == 0 || problem::count(gemm) == 0 {
        return Ok(());
    }
    let mut threads = threads.min(room);
    if threads > 1 && estimate(gemm) < SHARE_NS {
        threads = 1;
    }
    let strip = isa.mr().min(STRIP_A / strip_a(1, gemm.k));
    let (cols, whole_rows) = if unit.is_some() { (MATRIX_COLS, MATRIX_WHOLE_ROWS) } else { (MAX_COLS, WHOLE_ROWS) };
    // The unit has no strips: it packs B for few rows too, so that a row's bits do not depend on how many there are.
    let strip = if unit.is_some() { 0 } else { strip };
    let mut cut = Cut { strip, rows: MAX_ROWS, cols, strip_cols: STRIP_COLS };
    if whole > 0 {
        let aside = sums_aside(gemm.c.storage, gemm.k);
        // As many blocks for each thread: one more for one of them is the time of a block that all others wait.
        cut.rows = gemm.m.div_ceil(gemm.m.div_ceil(whole_rows).next_multiple_of(threads));
        if !aside {
            cut.cols = gemm.n.next_multiple_of(isa.nr());
        }
    }
    let mut tasks = cut.all(gemm);
    let enough = |tasks: usize| {
        let even = tasks.is_multiple_of(threads);
        let each = match gemm.m <= strip {
            true => STRIPS_PER_THREAD,
            false if whole > 0 => WHOLE_TASKS_PER_THREAD,
            false if even => EVEN_TASKS_PER_THREAD,
            false => TASKS_PER_THREAD,
        };
        tasks >= each * threads
    };
    while threads > 1 && !enough(tasks) {
        let Some(finer) = cut.finer(isa, gemm.m, gemm.n) else { break };
        cut = finer;
        tasks = cut.all(gemm);
    }
    let threads = threads.min(tasks).max(1);
    // SAFETY: both lie within the workspace, as there is room after them.
    let (start, workspace) = unsafe { (workspace.as_mut_ptr().add(skip), workspace.as_mut_ptr().add(skip + whole)) };
    let whole = (whole > 0).then_some(start);
    let shared = Shared { isa, unit, gemm, layout, workspace, cut, whole };
    if let Some(whole) = shared.whole {
        shared.pack_whole(whole, threads);
    }
    share_with(threads, tasks, |worker| Worker::new(&shared, worker), Worker::run);
    Ok(())
}

impl Shared<'_> {
    /// Packs all of B: for each block of k its panels, as far apart as those of the longest block.
    fn pack_whole(&self, whole: *mut u8, threads: usize) {
        let count = chunks(self.gemm.k).0;
        let across = self.gemm.n.div_ceil(WHOLE_COLS);
        let to = Whole(whole);
        // SAFETY: each worker has its part of the workspace, and each task its columns of one block of k.
        share(threads, count * across, |worker, task| unsafe {
            self.pack_cols(&to, worker, task / across, task % across * WHOLE_COLS);
        });
    }

    /// Packs up to WHOLE_COLS columns of block `q` of k.
    ///
    /// # Safety
    /// [`super::gemm`]'s contract; nobody else uses the worker's part of the workspace or packs these columns.
    unsafe fn pack_cols(&self, to: &Whole, worker: usize, q: usize, col: usize) {
        let Gemm { n, k, b, .. } = *self.gemm;
        let step = chunks(k).1;
        let panel = whole_panel(self.isa, self.unit, self.gemm);
        let first = q * n.div_ceil(self.isa.nr()) + col / self.isa.nr();
        let (b, cols) = (b.from((q * step) as isize, col as isize), WHOLE_COLS.min(n - col));
        // SAFETY: the caller's contract; the panels before these are those of the blocks before and of the columns before,
        // as WHOLE_COLS fill whole panels.
        unsafe {
            let stage = self.workspace.add(worker * self.layout.bytes + self.layout.stage).cast();
            pack_panels(self.isa, self.unit, b, [step.min(k - q * step), cols], panel, stage, to.0.add(first * panel));
        }
    }
}

/// Bytes from panel to panel of a B that is packed whole.
pub(super) fn whole_panel(isa: &Isa, unit: Option<&Matrix>, gemm: &Gemm<'_>) -> usize {
    let step = chunks(gemm.k).1;
    match unit {
        Some(_) => matrix::panel_bytes(step, parts(gemm.b.storage)),
        None => panel_bytes(isa, false, step),
    }
}

/// Packs `[k, n]` of B into panels `panel` bytes apart, through the stage that [`Scratch`] sets aside.
///
/// # Safety
/// [`super::gemm`]'s contract; nobody else uses the stage and the panels.
pub(super) unsafe fn pack_panels(
    isa: &Isa,
    unit: Option<&Matrix>,
    b: Mat,
    [k, n]: [usize; 2],
    panel: usize,
    stage: *mut f32,
    to: *mut u8,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let Some(unit) = unit else {
            return (isa.pack_b)(&ArgsB { b, k, n, panel_step: panel / size_of::<f32>(), stage }, to.cast());
        };
        let whole = if b.col_stride == 1 { n / SIDE * SIDE } else { 0 };
        (unit.split_b)(&SplitB { b, k, n: whole, panel_bytes: panel, in_place: true }, to);
        for col in (whole..n).step_by(SIDE) {
            let staged = stage.add(STAGE);
            let (from, n) = (b.from(0, col as isize), SIDE.min(n - col));
            (isa.pack_b)(&ArgsB { b: from, k, n, panel_step: panel_step(isa, k), stage }, staged);
            let b = Mat { data: staged.cast(), row_stride: SIDE as isize, col_stride: 1, ..b };
            let panels = SplitB { b, k, n: SIDE, panel_bytes: panel, in_place: false };
            (unit.split_b)(&panels, to.add(col / SIDE * panel));
        }
    }
}

/// Where a whole B is packed, for all threads.
struct Whole(*mut u8);

// SAFETY: threads write disjoint panels.
unsafe impl Sync for Whole {}

/// What one thread remembers from task to task.
struct Worker<'a> {
    shared: &'a Shared<'a>,
    /// Its part of the workspace.
    scratch: *mut u8,
    /// The problem of the last task, and the first task of that problem.
    problem: usize,
    first: usize,
    packed: Packed,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared<'a>, worker: usize) -> Self {
        // SAFETY: `run` made sure of room for every worker.
        let scratch = unsafe { shared.workspace.add(worker * shared.layout.bytes) };
        Worker { shared, scratch, problem: 0, first: 0, packed: None }
    }

    fn run(&mut self, drawn: usize) {
        let &Shared { isa, unit, gemm, ref layout, cut, whole, .. } = self.shared;
        if drawn < self.first {
            (self.problem, self.first) = (0, 0);
        }
        let mut m = problem::size(gemm, self.problem).0;
        let (mut down, mut across) = cut.one(m, gemm.n);
        while drawn >= self.first + down * across {
            self.first += down * across;
            self.problem += 1;
            m = problem::size(gemm, self.problem).0;
            (down, across) = cut.one(m, gemm.n);
        }
        let (i, j) = ((drawn - self.first) % down, (drawn - self.first) / down);
        let cols = cut.cols(m);
        let task = Task {
            isa,
            unit,
            gemm,
            layout,
            scratch: self.scratch,
            problem: problem::get(gemm, self.problem),
            strip: m <= cut.strip,
            whole: whole.map(<*mut u8>::cast_const),
            rows: (m * i / down, m * (i + 1) / down),
            cols: (j * cols, ((j + 1) * cols).min(gemm.n)),
        };
        // SAFETY: `super::gemm`'s contract; this task's block is drawn by this worker alone.
        unsafe { task.run(&mut self.packed) };
    }
}
