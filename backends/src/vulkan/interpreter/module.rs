//! A module of SPIR-V taken apart.

use std::ops::Index;

use super::Value;
use crate::vulkan::spirv::instructions;

/// What ids stand for. A module says below what number its ids are, so this is a list: each step of a lane looks several up.
pub(super) struct Ids<T>(Vec<Option<T>>);

impl<T> Default for Ids<T> {
    fn default() -> Ids<T> {
        Ids(Vec::new())
    }
}

impl<T> Ids<T> {
    /// Of ids below a bound.
    pub(super) fn below(bound: usize) -> Ids<T> {
        Ids((0..bound).map(|_| None).collect())
    }

    pub(super) fn insert(&mut self, id: u32, what: T) {
        if self.0.len() <= id as usize {
            self.0.resize_with(id as usize + 1, || None);
        }
        self.0[id as usize] = Some(what);
    }

    pub(super) fn get(&self, id: u32) -> Option<&T> {
        self.0.get(id as usize)?.as_ref()
    }
}

impl<T> Index<u32> for Ids<T> {
    type Output = T;

    fn index(&self, id: u32) -> &T {
        self.get(id).expect("an id that stands for something")
    }
}

/// A type.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Type {
    Void,
    Bool,
    Int { bits: u32 },
    Float { bits: u32, bf16: bool },
    Vector { of: u32, count: usize },
    Array { of: u32, count: usize },
    Endless { of: u32 },
    Struct(Vec<u32>),
    Pointer { class: u32, to: u32 },
    Matrix { of: u32 },
}

/// One instruction: its operation and its operands.
pub(super) struct Instruction {
    pub(super) operation: u32,
    pub(super) operands: Vec<u32>,
}

/// A variable outside of functions.
pub(super) struct Variable {
    pub(super) id: u32,
    pub(super) class: u32,
    pub(super) ty: u32,
    pub(super) start: Option<u32>,
}

/// Everything that is fixed before a kernel runs.
#[derive(Default)]
pub(super) struct Module {
    pub(super) code: Vec<Instruction>,
    pub(super) types: Ids<Type>,
    pub(super) constants: Ids<Value>,
    pub(super) variables: Vec<Variable>,
    /// Where functions and labels begin.
    pub(super) functions: Ids<usize>,
    pub(super) labels: Ids<usize>,
    pub(super) bindings: Ids<usize>,
    pub(super) builtins: Ids<u32>,
    /// Of the members of a struct.
    offsets: Ids<Vec<usize>>,
    strides: Ids<usize>,
    pub(super) entry: u32,
    /// All ids are below it.
    pub(super) bound: usize,
    pub(super) threads: usize,
}

impl Module {
    pub(super) fn of(words: &[u32]) -> Result<Module, String> {
        let mut m = Module { bound: words[3] as usize, ..Module::default() };
        let mut inside = false;
        for (at, (operation, words)) in instructions(words).enumerate() {
            let w = words[1..].to_vec();
            match operation {
                15 => m.entry = w[1],
                16 if w[1] == 17 => m.threads = (w[2] * w[3] * w[4]) as usize,
                71 if w[1] == 6 => m.strides.insert(w[0], w[2] as usize),
                71 if w[1] == 11 => m.builtins.insert(w[0], w[2]),
                71 if w[1] == 33 => m.bindings.insert(w[0], w[2] as usize),
                72 if w[2] == 35 => {
                    let mut offsets = m.offsets.get(w[0]).cloned().unwrap_or_default();
                    offsets.resize(offsets.len().max(w[1] as usize + 1), 0);
                    offsets[w[1] as usize] = w[3] as usize;
                    m.offsets.insert(w[0], offsets);
                }
                19..=32 | 4456 => {
                    let ty = m.ty(operation, &w)?;
                    m.types.insert(w[0], ty);
                }
                41 | 42 => m.constants.insert(w[1], Value::Word(u32::from(operation == 41))),
                43 => m.constants.insert(w[1], Value::Word(w[2])),
                44 => {
                    let value = match m.types[w[0]] {
                        Type::Matrix { .. } => m.zero(w[0]),
                        _ => Value::Many(w[2..].iter().map(|c| m.constants[*c].clone()).collect()),
                    };
                    m.constants.insert(w[1], value);
                }
                46 | 1 if !inside => {
                    let zero = m.zero(w[0]);
                    m.constants.insert(w[1], zero);
                }
                59 if !inside => {
                    let Type::Pointer { class, to } = m.types[w[0]] else { return Err("a variable".into()) };
                    m.variables.push(Variable { id: w[1], class, ty: to, start: w.get(3).copied() });
                }
                54 => {
                    m.functions.insert(w[1], at);
                    inside = true;
                }
                248 => m.labels.insert(w[0], at),
                _ => {}
            }
            m.code.push(Instruction { operation, operands: w });
        }
        Ok(m)
    }

    fn ty(&self, operation: u32, w: &[u32]) -> Result<Type, String> {
        let number = |id: u32| match self.constants[id] {
            Value::Word(n) => n as usize,
            _ => 0,
        };
        Ok(match operation {
            19 | 33 => Type::Void,
            20 => Type::Bool,
            21 => Type::Int { bits: w[1] },
            22 => Type::Float { bits: w[1], bf16: w.len() > 2 },
            23 => Type::Vector { of: w[1], count: w[2] as usize },
            28 => Type::Array { of: w[1], count: number(w[2]) },
            29 => Type::Endless { of: w[1] },
            30 => Type::Struct(w[1..].to_vec()),
            32 => Type::Pointer { class: w[1], to: w[2] },
            4456 if (number(w[3]), number(w[4])) == (16, 16) => Type::Matrix { of: w[1] },
            other => return Err(format!("type {other} is unknown")),
        })
    }

    /// The zero of a type.
    pub(super) fn zero(&self, ty: u32) -> Value {
        match &self.types[ty] {
            Type::Vector { of, count } | Type::Array { of, count } => Value::Many(vec![self.zero(*of); *count]),
            Type::Struct(members) => Value::Many(members.iter().map(|&m| self.zero(m)).collect()),
            Type::Matrix { .. } => Value::Matrix(std::rc::Rc::new(vec![0.0; 256])),
            Type::Void
            | Type::Bool
            | Type::Int { .. }
            | Type::Float { .. }
            | Type::Endless { .. }
            | Type::Pointer { .. } => Value::Word(0),
        }
    }

    /// Bytes of a value in memory.
    pub(super) fn bytes(&self, ty: u32) -> usize {
        match &self.types[ty] {
            Type::Bool => 4,
            Type::Int { bits } | Type::Float { bits, .. } => *bits as usize / 8,
            Type::Vector { of, count } => self.bytes(*of) * count,
            Type::Array { of, count } => self.stride(ty, *of) * count,
            Type::Struct(members) => {
                members.iter().zip(0..).map(|(&m, i)| self.offset(ty, i) + self.bytes(m)).max().unwrap_or(0)
            }
            Type::Void | Type::Endless { .. } | Type::Pointer { .. } | Type::Matrix { .. } => 0,
        }
    }

    fn stride(&self, ty: u32, of: u32) -> usize {
        self.strides.get(ty).copied().unwrap_or_else(|| self.bytes(of))
    }

    fn offset(&self, ty: u32, member: u32) -> usize {
        self.offsets.get(ty).and_then(|offsets| offsets.get(member as usize)).copied().unwrap_or(0)
    }

    /// Where a part of a value in memory is, and its type.
    pub(super) fn part(&self, ty: u32, index: u32) -> Result<(usize, u32), String> {
        match &self.types[ty] {
            Type::Struct(members) => Ok((self.offset(ty, index), members[index as usize])),
            Type::Array { of, .. } | Type::Endless { of } => Ok((index as usize * self.stride(ty, *of), *of)),
            Type::Vector { of, .. } => Ok((index as usize * self.bytes(*of), *of)),
            other => Err(format!("{other:?} has no parts")),
        }
    }
}
