//! One lane of a kernel: its variables, its place in the code.

use std::rc::Rc;

use half::{bf16, f16};

use super::module::{Ids, Instruction, Module, Type};
use super::{Memory, Pointer, Value};

/// Why a lane does not go on; with the place in the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Ready,
    Barrier(usize),
    Matrix(usize),
    Shuffle(usize),
    Done,
}

/// A function that is being run.
struct Frame {
    /// Where to go on in the caller, and what the result is called there.
    back: (usize, u32),
}

/// One lane.
pub(super) struct Lane<'a> {
    module: &'a Module,
    /// Of the globals and of all functions: none calls itself.
    values: Ids<Value>,
    variables: Vec<Value>,
    frames: Vec<Frame>,
    at: usize,
    /// The block it is in, and the one it came from.
    blocks: [u32; 2],
}

const MATRIX_SIDE: usize = 16;

/// Makes room for a workgroup's variables; pointers to all that lanes share.
pub(super) fn shared(m: &Module, memory: &mut Memory, numbers: usize) -> Result<Vec<(u32, Value)>, String> {
    let mut pointers = Vec::new();
    for v in &m.variables {
        let piece = match v.class {
            2 | 12 => *m.bindings.get(v.id).ok_or("a buffer without a binding")?,
            9 => numbers,
            4 => {
                memory.pieces.push(vec![0xff; m.bytes(v.ty)]);
                memory.pieces.len() - 1
            }
            _own => continue,
        };
        pointers.push((v.id, Value::Pointer(Pointer::Shared { memory: piece, at: 0, ty: v.ty })));
    }
    Ok(pointers)
}

fn word(value: &Value) -> Result<u32, String> {
    if let Value::Word(word) = value { Ok(*word) } else { Err(format!("{value:?} is no word")) }
}

/// A function of words on values, or on each part of them.
fn each(values: &[&Value], f: &dyn Fn(&[u32]) -> u32) -> Result<Value, String> {
    let Some(Value::Many(parts)) = values.first() else {
        let words = values.iter().map(|v| word(v)).collect::<Result<Vec<_>, _>>()?;
        return Ok(Value::Word(f(&words)));
    };
    let part = |i: usize| {
        let of = |v: &&Value| if let Value::Many(parts) = v { parts.get(i).cloned() } else { None };
        let own = values.iter().map(of).collect::<Option<Vec<_>>>().ok_or("not as many parts")?;
        each(&own.iter().collect::<Vec<_>>(), f)
    };
    Ok(Value::Many((0..parts.len()).map(part).collect::<Result<_, _>>()?))
}

impl<'a> Lane<'a> {
    pub(super) fn new(
        module: &'a Module,
        shared: &[(u32, Value)],
        thread: u32,
        group: [u32; 3],
        all: [u32; 3],
    ) -> Result<Lane<'a>, String> {
        let at = module.functions[module.entry] + 1;
        let frame = Frame { back: (usize::MAX, 0) };
        let mut values = Ids::below(module.bound);
        shared.iter().for_each(|(id, pointer)| values.insert(*id, pointer.clone()));
        let mut lane = Lane { module, values, variables: Vec::new(), frames: vec![frame], at, blocks: [0; 2] };
        let three = |v: [u32; 3]| Value::Many(v.map(Value::Word).to_vec());
        for v in &module.variables {
            let value = match (v.class, module.builtins.get(v.id)) {
                (1, Some(24)) => three(all),
                (1, Some(26)) => three(group),
                (1, Some(29)) => Value::Word(thread),
                (6, None) => v.start.map_or_else(|| module.zero(v.ty), |id| module.constants[id].clone()),
                (1, built_in) => return Err(format!("input {built_in:?} is unknown")),
                _shared => continue,
            };
            let pointer = lane.variable(value, v.ty);
            lane.set(v.id, pointer);
        }
        Ok(lane)
    }

    fn variable(&mut self, value: Value, ty: u32) -> Value {
        self.variables.push(value);
        Value::Pointer(Pointer::Own { variable: self.variables.len() - 1, path: Vec::new(), ty })
    }

    fn value(&self, id: u32) -> Result<&Value, String> {
        let found = self.values.get(id).or_else(|| self.module.constants.get(id));
        found.ok_or_else(|| format!("%{id} has no value"))
    }

    fn word(&self, id: u32) -> Result<u32, String> {
        word(self.value(id)?)
    }

    fn float(&self, id: u32) -> Result<f32, String> {
        Ok(f32::from_bits(self.word(id)?))
    }

    fn set(&mut self, id: u32, value: Value) {
        self.values.insert(id, value);
    }

    /// Keeps the result of an operation of the subgroup, if it has one.
    pub(super) fn take(&mut self, at: usize, result: &Option<Value>) {
        if let Some(value) = result {
            let id = self.module.code[at].operands[1];
            self.set(id, value.clone());
        }
    }

    fn go(&mut self, label: u32) {
        self.blocks = [label, self.blocks[0]];
        self.at = self.module.labels[label] + 1;
    }

    /// Goes on until it meets others.
    pub(super) fn run(&mut self, memory: &mut Memory) -> Result<Stop, String> {
        let module = self.module;
        loop {
            let at = self.at;
            let Instruction { operation, operands: w } = &module.code[at];
            self.at += 1;
            match operation {
                224 => return Ok(Stop::Barrier(at)),
                346 => return Ok(Stop::Shuffle(at)),
                4457..=4459 => return Ok(Stop::Matrix(at)),
                // Labels are passed; merges and scopes only tell of structure.
                246 | 247 | 55 | 8 | 317 => {}
                248 => self.blocks = [w[0], self.blocks[0]],
                249 => self.go(w[0]),
                250 => {
                    let taken = self.word(w[0])? != 0;
                    self.go(if taken { w[1] } else { w[2] });
                }
                251 => {
                    let (of, cases) = (self.word(w[0])?, w[2..].chunks_exact(2));
                    let to = cases.clone().find(|c| c[0] == of).map_or(w[1], |c| c[1]);
                    self.go(to);
                }
                253 | 254 => {
                    let result = if *operation == 254 { Some(self.value(w[0])?.clone()) } else { None };
                    let frame = self.frames.pop().ok_or("no function")?;
                    if self.frames.is_empty() {
                        return Ok(Stop::Done);
                    }
                    self.at = frame.back.0;
                    self.set(frame.back.1, result.unwrap_or(Value::Word(0)));
                }
                57 => {
                    let given = w[3..].iter().map(|&id| self.value(id).cloned()).collect::<Result<Vec<_>, _>>()?;
                    self.frames.push(Frame { back: (self.at, w[1]) });
                    let begins = module.functions[w[2]] + 1;
                    for (i, value) in given.into_iter().enumerate() {
                        self.set(module.code[begins + i].operands[1], value);
                    }
                    self.at = begins;
                }
                59 => {
                    let Type::Pointer { to, .. } = module.types[w[0]] else { return Err("a variable".into()) };
                    let start = match w.get(3) {
                        Some(&id) => self.value(id)?.clone(),
                        None => module.zero(to),
                    };
                    let pointer = self.variable(start, to);
                    self.set(w[1], pointer);
                }
                61 => {
                    let value = self.load(memory, w[2])?;
                    self.set(w[1], value);
                }
                62 => self.store(memory, w[0], w[1])?,
                // Atomic ones: lanes run one after another.
                227 => {
                    let value = self.load(memory, w[2])?;
                    self.set(w[1], value);
                }
                228 => self.store(memory, w[0], w[3])?,
                234 => {
                    let (old, more) = (self.load(memory, w[2])?, self.word(w[5])?);
                    let Value::Word(before) = old else { return Err("a sum of what is no number".into()) };
                    self.set(w[1], Value::Word(before.wrapping_add(more)));
                    self.store(memory, w[2], w[1])?;
                    self.set(w[1], old);
                }
                65 | 66 => {
                    let value = self.part_of(w)?;
                    self.set(w[1], value);
                }
                245 => {
                    let from = self.blocks[1];
                    let taken = w[2..].chunks_exact(2).find(|pair| pair[1] == from);
                    let value = self.value(taken.ok_or("no block it came from")?[0])?.clone();
                    self.set(w[1], value);
                }
                255 => return Err("what cannot be reached is reached".into()),
                _ => {
                    let value = self.result(*operation, w)?;
                    self.set(w[1], value);
                }
            }
        }
    }

    fn part_of(&self, w: &[u32]) -> Result<Value, String> {
        let Value::Pointer(mut pointer) = self.value(w[2])?.clone() else { return Err("no pointer".into()) };
        for &id in &w[3..] {
            let index = self.word(id)?;
            match &mut pointer {
                Pointer::Shared { at, ty, .. } => {
                    let (from, of) = self.module.part(*ty, index)?;
                    *at += from;
                    *ty = of;
                }
                Pointer::Own { path, ty, .. } => {
                    path.push(index);
                    *ty = self.module.part(*ty, index)?.1;
                }
            }
        }
        Ok(Value::Pointer(pointer))
    }

    fn load(&self, memory: &Memory, id: u32) -> Result<Value, String> {
        match self.value(id)? {
            Value::Pointer(Pointer::Shared { memory: piece, at, ty }) => memory.load(self.module, *piece, *at, *ty),
            Value::Pointer(Pointer::Own { variable, path, .. }) => {
                let mut value = &self.variables[*variable];
                for &i in path {
                    let Value::Many(parts) = value else { return Err("no parts".into()) };
                    value = parts.get(i as usize).ok_or("no such part")?;
                }
                Ok(value.clone())
            }
            other => Err(format!("a load from {other:?}")),
        }
    }

    fn store(&mut self, memory: &mut Memory, to: u32, id: u32) -> Result<(), String> {
        let value = self.value(id)?.clone();
        match self.value(to)?.clone() {
            Value::Pointer(Pointer::Shared { memory: piece, at, ty }) => {
                memory.store(self.module, piece, at, ty, &value)
            }
            Value::Pointer(Pointer::Own { variable, path, .. }) => {
                let mut place = &mut self.variables[variable];
                for i in path {
                    let Value::Many(parts) = place else { return Err("no parts".into()) };
                    place = parts.get_mut(i as usize).ok_or("no such part")?;
                }
                *place = value;
                Ok(())
            }
            other => Err(format!("a store to {other:?}")),
        }
    }

    /// What the lane gives to another at an exchange, and the bits in which their numbers differ.
    pub(super) fn given(&self, at: usize) -> Result<(Value, usize), String> {
        let w = &self.module.code[at].operands;
        Ok((self.value(w[3])?.clone(), self.word(w[4])? as usize))
    }

    /// What the subgroup does with a matrix; its result, if it has one.
    pub(super) fn matrix(&self, memory: &mut Memory, at: usize) -> Result<Option<Value>, String> {
        let Instruction { operation, operands: w } = &self.module.code[at];
        let matrix = |id: u32| match self.value(id) {
            Ok(Value::Matrix(matrix)) => Ok(Rc::clone(matrix)),
            other => Err(format!("{other:?} is no matrix")),
        };
        if *operation == 4459 {
            let (a, b, c) = (matrix(w[2])?, matrix(w[3])?, matrix(w[4])?);
            let mut out = (*c).clone();
            for (at, sum) in out.iter_mut().enumerate() {
                let (i, j) = (at / MATRIX_SIDE, at % MATRIX_SIDE);
                *sum += (0..MATRIX_SIDE).map(|k| a[i * MATRIX_SIDE + k] * b[k * MATRIX_SIDE + j]).sum::<f32>();
            }
            return Ok(Some(Value::Matrix(Rc::new(out))));
        }
        // Loads have the type and their name first, stores the matrix behind the pointer.
        let loads = *operation == 4457;
        let [pointer, layout, pitch] = if loads { [w[2], w[3], w[4]] } else { [w[0], w[2], w[3]] };
        let Value::Pointer(Pointer::Shared { memory: piece, at, ty }) = *self.value(pointer)? else {
            return Err("a matrix is not in memory that lanes share".into());
        };
        let pitch = self.word(pitch)? as usize * self.module.bytes(ty);
        let by_rows = self.word(layout)? == 0;
        let place = |i: usize, j: usize, bytes: usize| {
            let (line, along) = if by_rows { (i, j) } else { (j, i) };
            at + line * pitch + along * bytes
        };
        if !loads {
            let matrix = matrix(w[1])?;
            for (at, value) in matrix.iter().enumerate() {
                memory.put(piece, place(at / MATRIX_SIDE, at % MATRIX_SIDE, 4), &value.to_le_bytes())?;
            }
            return Ok(None);
        }
        let Type::Matrix { of } = self.module.types[w[0]] else { return Err("no type of a matrix".into()) };
        let element = |at: usize| -> Result<f32, String> {
            let (i, j) = (at / MATRIX_SIDE, at % MATRIX_SIDE);
            let two = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
            match self.module.types[of] {
                Type::Float { bits: 16, bf16: true } => {
                    Ok(bf16::from_bits(two(memory.slice(piece, place(i, j, 2), 2)?)).to_f32())
                }
                Type::Float { bits: 16, bf16: false } => {
                    Ok(f16::from_bits(two(memory.slice(piece, place(i, j, 2), 2)?)).to_f32())
                }
                ref other => Err(format!("a matrix of {other:?}")),
            }
        };
        let loaded = (0..MATRIX_SIDE * MATRIX_SIDE).map(element).collect::<Result<Vec<_>, _>>()?;
        Ok(Some(Value::Matrix(Rc::new(loaded))))
    }

    /// The result of what computes with values alone.
    fn result(&self, operation: u32, w: &[u32]) -> Result<Value, String> {
        let many = |id: u32| match self.value(id)? {
            Value::Many(parts) => Ok(parts.clone()),
            other => Err(format!("{other:?} has no parts")),
        };
        let both = |f: &dyn Fn(u32, u32) -> u32| match (self.value(w[2])?, self.value(w[3])?) {
            (Value::Word(a), Value::Word(b)) => Ok(Value::Word(f(*a, *b))),
            (a, b) => each(&[a, b], &|of| f(of[0], of[1])),
        };
        let ints = |f: fn(u32, u32) -> u32| both(&f);
        let floats = |f: fn(f32, f32) -> f32| both(&|a, b| f(f32::from_bits(a), f32::from_bits(b)).to_bits());
        let test = |f: fn(f32, f32) -> bool| both(&|a, b| u32::from(f(f32::from_bits(a), f32::from_bits(b))));
        let bits = |id: u32| match self.module.types[id] {
            Type::Int { bits } => bits,
            _ => 32,
        };
        match operation {
            1 => Ok(self.module.zero(w[0])),
            12 => match w[3] {
                4 => Ok(Value::Word(self.float(w[4])?.abs().to_bits())),
                29 => Ok(Value::Word(self.float(w[4])?.exp2().to_bits())),
                31 => Ok(Value::Word(self.float(w[4])?.sqrt().to_bits())),
                38 => each(&[self.value(w[4])?, self.value(w[5])?], &|of| of[0].min(of[1])),
                41 => each(&[self.value(w[4])?, self.value(w[5])?], &|of| of[0].max(of[1])),
                39 => each(&[self.value(w[4])?, self.value(w[5])?], &|of| (of[0] as i32).min(of[1] as i32) as u32),
                42 => each(&[self.value(w[4])?, self.value(w[5])?], &|of| (of[0] as i32).max(of[1] as i32) as u32),
                45 => each(&[self.value(w[4])?, self.value(w[5])?, self.value(w[6])?], &|of| {
                    let [x, least, most] = [of[0], of[1], of[2]].map(|word| word as i32);
                    x.max(least).min(most) as u32
                }),
                50 => each(&[self.value(w[4])?, self.value(w[5])?, self.value(w[6])?], &|of| {
                    let [a, b, c] = [of[0], of[1], of[2]].map(f32::from_bits);
                    a.mul_add(b, c).to_bits()
                }),
                other => Err(format!("function {other} is unknown")),
            },
            77 => {
                let index = self.word(w[3])? as usize;
                many(w[2])?.get(index).cloned().ok_or_else(|| "no such part".into())
            }
            79 => {
                let both = [many(w[2])?, many(w[3])?].concat();
                let part = |&i: &u32| both.get(i as usize).cloned().ok_or_else(|| "no such part".to_owned());
                Ok(Value::Many(w[4..].iter().map(part).collect::<Result<_, _>>()?))
            }
            80 => match self.module.types[w[0]] {
                Type::Matrix { .. } => Ok(self.module.zero(w[0])),
                // Of numbers and shorter vectors.
                Type::Vector { .. } => {
                    let parts = w[2..].iter().map(|&id| match self.value(id)? {
                        Value::Many(parts) => Ok(parts.clone()),
                        one => Ok(vec![one.clone()]),
                    });
                    Ok(Value::Many(parts.collect::<Result<Vec<_>, String>>()?.concat()))
                }
                _ => Ok(Value::Many(w[2..].iter().map(|&id| self.value(id).cloned()).collect::<Result<_, _>>()?)),
            },
            81 => {
                let mut value = self.value(w[2])?.clone();
                for &i in &w[3..] {
                    let Value::Many(parts) = value else { return Err("no parts".into()) };
                    value = parts.get(i as usize).ok_or("no such part")?.clone();
                }
                Ok(value)
            }
            83 | 124 => Ok(self.value(w[2])?.clone()),
            111 => Ok(Value::Word((self.word(w[2])? as i32 as f32).to_bits())),
            112 => Ok(Value::Word((self.word(w[2])? as f32).to_bits())),
            113 => Ok(Value::Word(if bits(w[0]) == 16 { self.word(w[2])? & 0xffff } else { self.word(w[2])? })),
            127 => Ok(Value::Word((-self.float(w[2])?).to_bits())),
            128 => ints(u32::wrapping_add),
            129 => floats(|a, b| a + b),
            130 => ints(u32::wrapping_sub),
            131 => floats(|a, b| a - b),
            132 => ints(u32::wrapping_mul),
            133 => floats(|a, b| a * b),
            134 => ints(|a, b| a.checked_div(b).unwrap_or(0)),
            136 => floats(|a, b| a / b),
            137 => ints(|a, b| a.checked_rem(b).unwrap_or(0)),
            142 => {
                let factor = self.float(w[3])?;
                each(&[self.value(w[2])?], &|of| (f32::from_bits(of[0]) * factor).to_bits())
            }
            164 | 170 => ints(|a, b| u32::from(a == b)),
            165 | 171 => ints(|a, b| u32::from(a != b)),
            166 => ints(|a, b| a | b),
            167 => ints(|a, b| a & b),
            168 => Ok(Value::Word(1 - self.word(w[2])?)),
            169 => match self.value(w[2])? {
                Value::Many(_) => each(&[self.value(w[2])?, self.value(w[3])?, self.value(w[4])?], &|of| {
                    if of[0] != 0 { of[1] } else { of[2] }
                }),
                one => Ok(self.value(if word(one)? != 0 { w[3] } else { w[4] })?.clone()),
            },
            172 => ints(|a, b| u32::from(a > b)),
            173 => ints(|a, b| u32::from(a as i32 > b as i32)),
            174 => ints(|a, b| u32::from(a >= b)),
            175 => ints(|a, b| u32::from(a as i32 >= b as i32)),
            176 => ints(|a, b| u32::from(a < b)),
            177 => ints(|a, b| u32::from((a as i32) < b as i32)),
            178 => ints(|a, b| u32::from(a <= b)),
            179 => ints(|a, b| u32::from(a as i32 <= b as i32)),
            180 => test(|a, b| a == b),
            184 => test(|a, b| a < b),
            186 => test(|a, b| a > b),
            188 => test(|a, b| a <= b),
            190 => test(|a, b| a >= b),
            194 => ints(|a, b| a >> (b & 31)),
            195 => ints(|a, b| (a as i32 >> (b & 31)) as u32),
            196 => ints(|a, b| a << (b & 31)),
            197 => ints(|a, b| a | b),
            198 => ints(|a, b| a ^ b),
            199 => ints(|a, b| a & b),
            200 => Ok(Value::Word(!self.word(w[2])?)),
            other => Err(format!("operation {other} is unknown")),
        }
    }
}
