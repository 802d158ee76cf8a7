//! Runs a fused chain of elementwise operations tile by tile: the registers of a tile stay in the nearest caches,
//! every instruction is one vectorised loop over them, and tiles run in parallel.

mod ops;
mod program;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

pub use program::{
    Action, Binary, Compare, Constant, Input, Instr, Kind, MAX_DIMS, MAX_OUTPUTS, MAX_REGISTERS, Output, Program,
    ProgramError, Register, Storage, Unary,
};
use program::{Step, Walk};

use super::par::tasks;
use crate::cpu::element::{Element, simd};

/// Elements of one tile: a register is 4 KiB.
const TILE: usize = 1024;
/// Elements times their cost in one task.
const SPAN: usize = 32 * 1024;

/// The elements of an input, from the first one on.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// For [`Storage::F32`].
    F32(&'a [f32]),
    /// For [`Storage::Bf16`].
    Bf16(&'a [bf16]),
    /// For [`Storage::F16`].
    F16(&'a [f16]),
    /// For [`Storage::I32`].
    I32(&'a [i32]),
    /// For [`Storage::U32`].
    U32(&'a [u32]),
    /// For [`Storage::Bool`].
    Bool(&'a [u8]),
}

/// The elements of an output.
#[derive(Debug)]
pub enum OperandMut<'a> {
    /// For [`Storage::F32`].
    F32(&'a mut [f32]),
    /// For [`Storage::Bf16`].
    Bf16(&'a mut [bf16]),
    /// For [`Storage::F16`].
    F16(&'a mut [f16]),
    /// For [`Storage::I32`].
    I32(&'a mut [i32]),
    /// For [`Storage::U32`].
    U32(&'a mut [u32]),
    /// For [`Storage::Bool`].
    Bool(&'a mut [u8]),
}

impl Operand<'_> {
    fn len(&self, storage: Storage) -> Option<usize> {
        match (self, storage) {
            (Operand::F32(x), Storage::F32) => Some(x.len()),
            (Operand::Bf16(x), Storage::Bf16) => Some(x.len()),
            (Operand::F16(x), Storage::F16) => Some(x.len()),
            (Operand::I32(x), Storage::I32) => Some(x.len()),
            (Operand::U32(x), Storage::U32) => Some(x.len()),
            (Operand::Bool(x), Storage::Bool) => Some(x.len()),
            (Operand::F32(_) | Operand::Bf16(_) | Operand::F16(_), _) => None,
            (Operand::I32(_) | Operand::U32(_) | Operand::Bool(_), _) => None,
        }
    }
}

impl OperandMut<'_> {
    fn len(&self, storage: Storage) -> Option<usize> {
        match (self, storage) {
            (OperandMut::F32(x), Storage::F32) => Some(x.len()),
            (OperandMut::Bf16(x), Storage::Bf16) => Some(x.len()),
            (OperandMut::F16(x), Storage::F16) => Some(x.len()),
            (OperandMut::I32(x), Storage::I32) => Some(x.len()),
            (OperandMut::U32(x), Storage::U32) => Some(x.len()),
            (OperandMut::Bool(x), Storage::Bool) => Some(x.len()),
            (OperandMut::F32(_) | OperandMut::Bf16(_) | OperandMut::F16(_), _) => None,
            (OperandMut::I32(_) | OperandMut::U32(_) | OperandMut::Bool(_), _) => None,
        }
    }
}

/// Runs `program` over `inputs`, writing every element of `outputs`, both in the order of the program.
///
/// The result does not depend on the number of threads, and nothing is allocated. Panics when an operand is of another
/// type than its program says, an input is shorter than its strides reach, or an output has not exactly the shape's
/// elements.
pub fn elementwise(program: &Program, inputs: &[Operand<'_>], outputs: &mut [OperandMut<'_>]) {
    assert!(inputs.len() == program.inputs.len() && outputs.len() == program.outputs.len());
    for (input, (storage, walk)) in inputs.iter().zip(&program.inputs) {
        assert!(input.len(*storage).is_some_and(|len| len >= walk.span), "an input of another type or too short");
    }
    for (output, want) in outputs.iter().zip(&program.outputs) {
        let fits = output.len(want.storage) == Some(program.len);
        assert!(fits, "an output of another type or size than its program says");
    }
    let mut from = [std::ptr::null(); MAX_REGISTERS];
    let mut to = [std::ptr::null_mut(); MAX_OUTPUTS];
    for (from, input) in from.iter_mut().zip(inputs) {
        *from = match input {
            Operand::F32(x) => x.as_ptr().cast(),
            Operand::Bf16(x) => x.as_ptr().cast(),
            Operand::F16(x) => x.as_ptr().cast(),
            Operand::I32(x) => x.as_ptr().cast(),
            Operand::U32(x) => x.as_ptr().cast(),
            Operand::Bool(x) => x.as_ptr().cast(),
        };
    }
    for (to, output) in to.iter_mut().zip(outputs.iter_mut()) {
        *to = match output {
            OperandMut::F32(x) => x.as_mut_ptr().cast(),
            OperandMut::Bf16(x) => x.as_mut_ptr().cast(),
            OperandMut::F16(x) => x.as_mut_ptr().cast(),
            OperandMut::I32(x) => x.as_mut_ptr().cast(),
            OperandMut::U32(x) => x.as_mut_ptr().cast(),
            OperandMut::Bool(x) => x.as_mut_ptr().cast(),
        };
    }
    // SAFETY: the slices are of the program's types and sizes, as checked, and borrowed for the whole call.
    unsafe { elementwise_at(program, &from[..inputs.len()], &to[..outputs.len()]) }
}

/// Runs `program` over memory given by address.
///
/// # Safety
/// For the time of the call, each address is that of initialised, aligned memory of its type in the program, long enough
/// for its strides (inputs) or of exactly the shape's elements (outputs), that nobody else writes. Outputs do not
/// overlap each other. An output may lie exactly over an input of the same type that is not broadcast, not otherwise
/// overlap one: a tile of every input is loaded before that tile of any output is stored.
pub unsafe fn elementwise_at(program: &Program, inputs: &[*const u8], outputs: &[*mut u8]) {
    assert!(inputs.len() == program.inputs.len() && outputs.len() == program.outputs.len());
    let len = program.len;
    let memory = Memory { inputs, outputs };
    let span = (SPAN / (TILE * program.weight)).clamp(1, 16) * TILE;
    tasks(len.div_ceil(span), len.saturating_mul(program.weight), |task| {
        let from = task * span;
        let to = len.min(from + span);
        // SAFETY: by the promise above, and tasks have disjoint ranges of every output.
        unsafe { run_pieces(program, &memory, TILE.min(to - from), &mut tiles(from, to)) };
    });
}

/// Runs `program` on the calling thread over a part of its elements, seen as rows of `width` elements: columns `cols` of
/// rows `rows`. The elements get the bits that [`elementwise_at`] gives them.
///
/// # Safety
/// As [`elementwise_at`], for the elements of this part. Panics when the part is not within the elements.
pub unsafe fn elementwise_part(
    program: &Program,
    inputs: &[*const u8],
    outputs: &[*mut u8],
    width: usize,
    rows: Range<usize>,
    cols: Range<usize>,
) {
    assert!(inputs.len() == program.inputs.len() && outputs.len() == program.outputs.len());
    if rows.is_empty() || cols.is_empty() {
        return;
    }
    assert!(cols.end <= width && rows.end <= program.len / width);
    let longest = TILE.min(cols.len());
    let mut pieces = rows.flat_map(|row| tiles(row * width + cols.start, row * width + cols.end));
    // SAFETY: by the promise above.
    unsafe { run_pieces(program, &Memory { inputs, outputs }, longest, &mut pieces) };
}

/// Elements `from..to` in pieces of at most [`TILE`]: first element and length.
#[inline(always)]
fn tiles(from: usize, to: usize) -> impl Iterator<Item = (usize, usize)> {
    (from..to).step_by(TILE).map(move |start| (start, TILE.min(to - start)))
}

/// The addresses of one run, for the threads that share it.
struct Memory<'a> {
    inputs: &'a [*const u8],
    outputs: &'a [*mut u8],
}

// SAFETY: the addresses are used only as `elementwise_at` promises, by tasks with disjoint ranges of every output.
unsafe impl Sync for Memory<'_> {}

/// The registers of one tile. References are made from the raw pointers one by one, so that an instruction can hold its
/// operands and its result, which the program keeps distinct.
struct Registers {
    /// Where each register lies: in the memory of the task, or in that of an operand of the run.
    at: [*mut u32; MAX_REGISTERS],
    count: usize,
    /// Initialised words of each register.
    len: usize,
}

impl Registers {
    /// The first `len` values of a register, to read.
    ///
    /// # Safety
    /// No mutable reference to the register is alive.
    #[inline(always)]
    unsafe fn read(&self, register: Register, len: usize) -> &[u32] {
        assert!(usize::from(register) < self.count && len <= self.len);
        // SAFETY: in range and initialised by the assertion, not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at[usize::from(register)], len) }
    }

    /// The first `len` values of a register, to write.
    ///
    /// # Safety
    /// No other reference to the register is alive.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    unsafe fn write(&self, register: Register, len: usize) -> &mut [u32] {
        assert!(usize::from(register) < self.count && len <= self.len);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.at[usize::from(register)], len) }
    }
}

/// Which operands the instructions work on where they lie, instead of on copies in registers.
#[derive(Default)]
struct InPlace {
    inputs: [bool; MAX_REGISTERS],
    outputs: [bool; MAX_OUTPUTS],
}

impl InPlace {
    /// An input without a stretch and in words. An output in words that is the only one of its register, if that is not
    /// one that is loaded, and overwrites no input: an instruction may read that input after this output is written.
    fn of(program: &Program, memory: &Memory<'_>) -> InPlace {
        let words = |storage: Storage| matches!(storage, Storage::F32 | Storage::I32 | Storage::U32);
        let mut place = InPlace::default();
        for (place, (storage, walk)) in place.inputs.iter_mut().zip(&program.inputs) {
            *place = words(*storage) && matches!(walk.dims[..], [(_, 1)]);
        }
        let loaded = program.inputs.len() + program.constants.len();
        for (i, output) in program.outputs.iter().enumerate() {
            let only = program.outputs.iter().filter(|other| other.register == output.register).count() == 1;
            let overwrites = memory.inputs.contains(&memory.outputs[i].cast_const());
            place.outputs[i] = words(output.storage) && only && usize::from(output.register) >= loaded && !overwrites;
        }
        place
    }
}

/// Pieces (first element, length) of at most `longest` elements. They are told by a table of functions, so that there is one copy of
/// all instructions for each instruction set.
///
/// # Safety
/// As [`elementwise_at`], and no other thread writes these elements of the outputs.
unsafe fn run_pieces(
    program: &Program,
    memory: &Memory<'_>,
    longest: usize,
    pieces: &mut dyn Iterator<Item = (usize, usize)>,
) {
    let Memory { inputs, outputs } = *memory;
    let place = InPlace::of(program, memory);
    let mut words = MaybeUninit::<[[u32; TILE]; MAX_REGISTERS]>::uninit();
    let start: *mut u32 = words.as_mut_ptr().cast();
    let at = std::array::from_fn(|register| start.wrapping_add(register * TILE));
    let mut registers = Registers { at, count: program.registers, len: longest };
    for register in 0..registers.count {
        // SAFETY: inside `words`. Only what is used is cleared: a decode step must not pay for whole tiles.
        unsafe { registers.at[register].write_bytes(0, registers.len) };
    }
    simd(
        #[inline(always)]
        || {
            // What is equal everywhere is loaded once: no instruction writes these registers.
            for (i, &constant) in program.constants.iter().enumerate() {
                // SAFETY: the only reference alive.
                unsafe { registers.write((program.inputs.len() + i) as Register, registers.len) }.fill(constant.word());
            }
            let scalars = inputs.iter().zip(&program.inputs).enumerate().filter(|(_, (_, input))| input.1.is_scalar());
            for (i, (&operand, (storage, walk))) in scalars {
                // SAFETY: the only reference alive; the operand's memory by the promise above.
                unsafe { load(operand, *storage, walk, 0, registers.write(i as Register, registers.len)) };
            }
            for (start, len) in pieces {
                for (i, (&operand, (storage, walk))) in inputs.iter().zip(&program.inputs).enumerate() {
                    if place.inputs[i] {
                        // Only read: no instruction writes the register of an input.
                        registers.at[i] = operand.cast::<u32>().wrapping_add(start).cast_mut();
                    } else if !walk.is_scalar() {
                        // SAFETY: the only reference alive; the operand's memory by the promise above.
                        unsafe { load(operand, *storage, walk, start, registers.write(i as Register, len)) };
                    }
                }
                for (i, (&out, want)) in outputs.iter().zip(&program.outputs).enumerate() {
                    if place.outputs[i] {
                        // Whatever the program keeps in this register before its last value, it writes before it reads.
                        registers.at[usize::from(want.register)] = out.cast::<u32>().wrapping_add(start);
                    }
                }
                for step in &program.steps {
                    // SAFETY: no reference into the registers is alive here.
                    unsafe { run_step(step, &registers, len) };
                }
                for (i, (&out, want)) in outputs.iter().zip(&program.outputs).enumerate() {
                    if !place.outputs[i] {
                        // SAFETY: nothing is written here but this task's part of the output.
                        unsafe { store(out, want.storage, start, registers.read(want.register, len)) };
                    }
                }
            }
        },
    );
}

/// One instruction on the first `len` values.
///
/// # Safety
/// No reference into the registers is alive.
#[inline(always)]
unsafe fn run_step(step: &Step, registers: &Registers, len: usize) {
    // SAFETY: by the promise above, and since a result is never one of the instruction's operands.
    let (read, out) = unsafe { (|r| registers.read(r, len), registers.write(step.instr.out, len)) };
    match step.instr.action {
        Action::Unary { op, x } => ops::unary(op, step.kind, read(x), out),
        Action::Binary { op, a, b } => ops::binary(op, step.kind, read(a), read(b), out),
        Action::Compare { op, a, b } => ops::compare(op, step.kind, read(a), read(b), out),
        Action::Select { condition, a, b } => ops::select(read(condition), read(a), read(b), out),
        Action::Cast { x, to } => ops::cast(step.kind, to, read(x), out),
    }
}

/// Elements from `start` on of the broadcast input, as register words.
///
/// # Safety
/// `x` is the address of the input, as [`elementwise_at`] wants it.
#[inline(always)]
unsafe fn load(x: *const u8, storage: Storage, walk: &Walk, start: usize, out: &mut [u32]) {
    let bf16 = |x: bf16| u32::from(x.to_bits()) << 16;
    // SAFETY: by the promise above.
    unsafe {
        match storage {
            Storage::F32 | Storage::I32 | Storage::U32 => gather(x.cast::<u32>(), walk, start, out, |x| x, copy),
            Storage::Bf16 => gather(x.cast::<bf16>(), walk, start, out, bf16, each(bf16)),
            // The slice conversion of `half` uses the vector instruction where there is one.
            Storage::F16 => gather(
                x.cast::<f16>(),
                walk,
                start,
                out,
                |x| x.to_f32().to_bits(),
                |x, out| x.convert_to_f32_slice(bytemuck::cast_slice_mut(out)),
            ),
            Storage::Bool => gather(x, walk, start, out, |x| u32::from(x != 0), each(|x: u8| u32::from(x != 0))),
        }
    }
}

/// Copies words in steps of some vectors each. The library's copy of a whole tile uses an instruction that takes longer
/// to get going than the tile takes.
#[inline(always)]
fn copy(from: &[u32], to: &mut [u32]) {
    let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<64>(), to.as_chunks_mut::<64>());
    for (from, to) in from.iter().zip(to) {
        *to = *from;
    }
    to_rest.copy_from_slice(from_rest);
}

/// Applies `f` to a run.
#[inline(always)]
fn each<T: Copy>(f: impl Fn(T) -> u32) -> impl Fn(&[T], &mut [u32]) {
    move |x, out| out.iter_mut().zip(x).for_each(|(o, &x)| *o = f(x))
}

/// Follows the walk from its element `start` on, run by run of its innermost dimension: `run` converts a contiguous
/// one, `one` a single element.
///
/// # Safety
/// `x` is the address of as many elements as the walk spans.
#[inline(always)]
unsafe fn gather<T: Copy>(
    x: *const T,
    walk: &Walk,
    start: usize,
    out: &mut [u32],
    one: impl Fn(T) -> u32,
    run: impl Fn(&[T], &mut [u32]),
) {
    let rank = walk.dims.len();
    let (n, stride) = walk.dims[rank - 1];
    let mut index = [0; MAX_DIMS];
    let (mut base, mut left) = (0, start / n);
    for (i, &(n, stride)) in walk.dims[..rank - 1].iter().enumerate().rev() {
        index[i] = left % n;
        base += index[i] * stride;
        left /= n;
    }
    let (mut at, mut out) = (start % n, out);
    loop {
        let count = out.len().min(n - at);
        let (now, later) = out.split_at_mut(count);
        let first = base + at * stride;
        // SAFETY: the walk stays inside its span.
        unsafe {
            match stride {
                1 => run(std::slice::from_raw_parts(x.add(first), count), now),
                0 => now.fill(one(*x.add(first))),
                _ => now.iter_mut().enumerate().for_each(|(i, o)| *o = one(*x.add(first + i * stride))),
            }
        }
        if later.is_empty() {
            return;
        }
        (out, at) = (later, 0);
        // The next run: count up the outer dimensions like an odometer.
        for (i, &(n, stride)) in walk.dims[..rank - 1].iter().enumerate().rev() {
            index[i] += 1;
            base += stride;
            if index[i] < n {
                break;
            }
            base -= n * stride;
            index[i] = 0;
        }
    }
}

/// Writes register words to the elements from `start` on.
///
/// # Safety
/// `out` is the address of the output, as [`elementwise_at`] wants it, and no other thread writes these elements.
#[inline(always)]
unsafe fn store(out: *mut u8, storage: Storage, start: usize, words: &[u32]) {
    /// # Safety
    /// As `store`.
    #[inline(always)]
    unsafe fn part<'a, T>(out: *mut u8, start: usize, n: usize) -> &'a mut [T] {
        // SAFETY: by the promise above.
        unsafe { std::slice::from_raw_parts_mut(out.cast::<T>().add(start), n) }
    }
    let n = words.len();
    // SAFETY: by the promise above.
    unsafe {
        match storage {
            Storage::F32 | Storage::I32 | Storage::U32 => copy(words, part::<u32>(out, start, n)),
            Storage::F16 => part::<f16>(out, start, n).convert_from_f32_slice(bytemuck::cast_slice(words)),
            Storage::Bf16 => {
                let words = words.iter().map(|&w| f32::from_bits(w));
                part::<bf16>(out, start, n).iter_mut().zip(words).for_each(|(o, w)| *o = Element::from_f32(w));
            }
            Storage::Bool => part::<u8>(out, start, n).iter_mut().zip(words).for_each(|(o, &w)| *o = w as u8),
        }
    }
}
