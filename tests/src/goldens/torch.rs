//! Tensors from a file that `torch.save` wrote, read without running anything in it.
//!
//! Such a file is a zip of stored members: `NAME/data.pkl`, a pickle that names storages, and `NAME/data/KEY`, their bytes.
//! The pickle is run by a machine that knows values and the three names a state dict needs; any other name becomes a value
//! without meaning, and nothing is ever called.

use std::collections::HashMap;
use std::path::Path;

use moebius_ir::{DType, Tensor, TensorType};

use super::set::{Problem, bytes};

/// A value of a pickle.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// A number.
    Number(f64),
    /// A text.
    Text(String),
    /// A tuple or list.
    List(Vec<Item>),
    /// A dictionary in order.
    Map(Vec<(Item, Item)>),
    /// A global name, `module name`.
    Name(String),
    /// The storage of a tensor: its dtype's name and its key.
    Storage(String, String),
    /// A tensor.
    Tensor(Tensor),
    /// Anything else.
    Opaque,
}

impl Item {
    /// The entry of a dictionary.
    pub(super) fn entry(&self, key: &str) -> Option<&Item> {
        self.entries().iter().find(|(k, _)| matches!(k, Item::Text(t) if t == key)).map(|(_, v)| v)
    }

    /// The entries of a dictionary; none of another value.
    pub(super) fn entries(&self) -> &[(Item, Item)] {
        if let Item::Map(entries) = self { entries } else { &[] }
    }

    /// All tensors of a dictionary, by key.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries().iter().filter_map(|(key, value)| match (key, value) {
            (Item::Text(key), Item::Tensor(tensor)) => Some((key.as_str(), tensor)),
            (_, _) => None,
        })
    }
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<Item, Problem> {
    let content = bytes(path)?;
    let wrong =
        |found: &str| Problem::Format { path: path.into(), wanted: "a state saved by torch.save", found: found.into() };
    let members = members(&content).ok_or_else(|| wrong("no zip of stored members"))?;
    let pickle = members.iter().find(|(name, _)| name.ends_with("/data.pkl")).ok_or_else(|| wrong("no data.pkl"))?;
    let root = pickle.0.trim_end_matches("data.pkl");
    Pickle {
        code: pickle.1,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        root,
        members: &members,
    }
    .run()
    .map_err(|e| wrong(&e))
}

fn u16_at(b: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(b.get(at..at + 2)?.try_into().ok()?)))
}

fn u32_at(b: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(b.get(at..at.checked_add(4)?)?.try_into().ok()?)).ok()
}

/// The stored members of a zip without zip64, from its central directory; `None` for any other file.
fn members(zip: &[u8]) -> Option<HashMap<String, &[u8]>> {
    let end = (0..zip.len().checked_sub(21)?).rev().find(|&i| zip[i..].starts_with(b"PK\x05\x06"))?;
    let (count, mut at) = (u16_at(zip, end + 10)?, u32_at(zip, end + 16)?);
    let mut members = HashMap::new();
    for _ in 0..count {
        let stored = zip.get(at..)?.starts_with(b"PK\x01\x02") && u16_at(zip, at + 10)? == 0;
        let (size, local) = (u32_at(zip, at + 24)?, u32_at(zip, at + 42)?);
        let (name, extra, comment) = (u16_at(zip, at + 28)?, u16_at(zip, at + 30)?, u16_at(zip, at + 32)?);
        let text = std::str::from_utf8(zip.get(at + 46..at + 46 + name)?).ok()?;
        // The local header has its own lengths, as torch pads there to align the data.
        let start = local.checked_add(30 + u16_at(zip, local + 26)? + u16_at(zip, local + 28)?)?;
        let content = stored.then(|| zip.get(start..start.checked_add(size)?)).flatten()?;
        members.insert(text.to_owned(), content);
        at += 46 + name + extra + comment;
    }
    Some(members)
}

struct Pickle<'a> {
    code: &'a [u8],
    at: usize,
    stack: Vec<Item>,
    marks: Vec<usize>,
    memo: HashMap<usize, Item>,
    root: &'a str,
    members: &'a HashMap<String, &'a [u8]>,
}

impl Pickle<'_> {
    fn take(&mut self, n: usize) -> Result<&[u8], String> {
        let part = self.at.checked_add(n).and_then(|end| self.code.get(self.at..end));
        self.at = self.at.saturating_add(n);
        part.ok_or_else(|| "a pickle that ends early".into())
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "a short number".into())
    }

    fn line(&mut self) -> Result<String, String> {
        let length = self.code.get(self.at..).and_then(|c| c.iter().position(|&b| b == b'\n'));
        let length = length.ok_or("a line that does not end")?;
        let line = String::from_utf8_lossy(self.take(length)?).into_owned();
        self.at += 1;
        Ok(line)
    }

    fn pop(&mut self) -> Result<Item, String> {
        self.stack.pop().ok_or_else(|| "an empty stack".into())
    }

    fn since_mark(&mut self) -> Result<Vec<Item>, String> {
        let mark = self.marks.pop().filter(|&m| m <= self.stack.len()).ok_or("no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, n: usize) -> Result<(), String> {
        let start = self.stack.len().checked_sub(n).ok_or("an empty stack")?;
        let items = self.stack.split_off(start);
        self.stack.push(Item::List(items));
        Ok(())
    }

    fn run(mut self) -> Result<Item, String> {
        loop {
            let op = self.number::<1>()?[0];
            match op {
                0x80 => drop(self.take(1)?),
                b'}' => self.stack.push(Item::Map(Vec::new())),
                b']' | b')' => self.stack.push(Item::List(Vec::new())),
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.stack.push(Item::Opaque),
                0x88 | 0x89 => self.stack.push(Item::Number(f64::from(op == 0x88))),
                b'K' => {
                    let [n] = self.number()?;
                    self.stack.push(Item::Number(f64::from(n)));
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.number()?);
                    self.stack.push(Item::Number(f64::from(n)));
                }
                b'J' => {
                    let n = i32::from_le_bytes(self.number()?);
                    self.stack.push(Item::Number(f64::from(n)));
                }
                b'G' => {
                    let n = f64::from_be_bytes(self.number()?);
                    self.stack.push(Item::Number(n));
                }
                0x8a => {
                    let [n] = self.number::<1>()?;
                    let digits = self.take(usize::from(n))?.to_vec();
                    let value = digits.iter().rev().fold(0.0, |v, &b| v * 256.0 + f64::from(b));
                    let negative = digits.last().is_some_and(|b| b & 0x80 != 0);
                    let least = if negative { 256f64.powi(i32::from(n)) } else { 0.0 };
                    self.stack.push(Item::Number(value - least));
                }
                b'X' => {
                    let n = u32::from_le_bytes(self.number()?) as usize;
                    let text = String::from_utf8_lossy(self.take(n)?).into_owned();
                    self.stack.push(Item::Text(text));
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.stack.push(Item::Name(format!("{module} {name}")));
                }
                b'q' | b'r' => {
                    let key = if op == b'q' {
                        usize::from(self.number::<1>()?[0])
                    } else {
                        u32::from_le_bytes(self.number()?) as usize
                    };
                    // A container is put into the memo before it is filled; nothing here asks for one by it.
                    let top = self.stack.last().cloned().ok_or("an empty stack")?;
                    self.memo.insert(key, top);
                }
                b'h' | b'j' => {
                    let key = if op == b'h' {
                        usize::from(self.number::<1>()?[0])
                    } else {
                        u32::from_le_bytes(self.number()?) as usize
                    };
                    let item = self.memo.get(&key).cloned().ok_or("a memo that was not made")?;
                    self.stack.push(item);
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.stack.push(Item::List(items));
                }
                0x85..=0x87 => self.tuple(usize::from(op - 0x84))?,
                b'Q' => {
                    let id = self.pop()?;
                    self.stack.push(storage(&id));
                }
                b'R' => {
                    let (arguments, called) = (self.pop()?, self.pop()?);
                    let item = self.made(&called, arguments)?;
                    self.stack.push(item);
                }
                b'b' => drop(self.pop()?),
                b's' | b'u' => {
                    let pairs = if op == b'u' {
                        self.since_mark()?
                    } else {
                        let (value, key) = (self.pop()?, self.pop()?);
                        vec![key, value]
                    };
                    let Some(Item::Map(map)) = self.stack.last_mut() else { return Err("no dictionary".into()) };
                    map.extend(pairs.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())));
                }
                b'a' | b'e' => {
                    let items = if op == b'e' { self.since_mark()? } else { vec![self.pop()?] };
                    let Some(Item::List(list)) = self.stack.last_mut() else { return Err("no list".into()) };
                    list.extend(items);
                }
                b'.' => return self.pop(),
                other => return Err(format!("the pickle code {other:#x}")),
            }
        }
    }

    /// What a call of a global name stands for.
    fn made(&self, called: &Item, arguments: Item) -> Result<Item, String> {
        let Item::Name(name) = called else { return Ok(Item::Opaque) };
        match (name.as_str(), arguments) {
            ("collections OrderedDict", _) => Ok(Item::Map(Vec::new())),
            ("torch._utils _rebuild_tensor_v2", Item::List(arguments)) => self.tensor(&arguments),
            (_, _) => Ok(Item::Opaque),
        }
    }

    /// From storage, offset, shape and strides.
    fn tensor(&self, arguments: &[Item]) -> Result<Item, String> {
        let [Item::Storage(dtype, key), Item::Number(offset), Item::List(shape), Item::List(strides), ..] = arguments
        else {
            return Err("a tensor without storage, offset, shape and strides".into());
        };
        let sizes = |items: &[Item]| -> Option<Vec<usize>> {
            items.iter().map(|i| if let Item::Number(n) = i { Some(*n as usize) } else { None }).collect()
        };
        let (shape, strides) = (sizes(shape).ok_or("a shape")?, sizes(strides).ok_or("strides")?);
        let dtype = match dtype.as_str() {
            "torch FloatStorage" => DType::F32,
            "torch BFloat16Storage" => DType::Bf16,
            "torch HalfStorage" => DType::F16,
            "torch IntStorage" => DType::I32,
            _other => return Ok(Item::Opaque),
        };
        let content = self.members.get(&format!("{}data/{key}", self.root)).ok_or(format!("no storage {key}"))?;
        let flat = content.len() / dtype.bytes();
        let flat = Tensor::from_bytes(TensorType::new(dtype, [flat]), &content[..flat * dtype.bytes()]);
        let ty = TensorType::new(dtype, shape.clone());
        let elements = ty.shape.checked_elements().filter(|&n| n <= flat.data.len()).ok_or("too large a shape")?;
        let mut data = Vec::with_capacity(elements);
        for i in 0..elements {
            let (mut rest, mut at) = (i, *offset as usize);
            for (extent, stride) in shape.iter().zip(&strides).rev() {
                at = at.saturating_add((rest % extent).saturating_mul(*stride));
                rest /= extent;
            }
            data.push(*flat.data.get(at).ok_or("strides beyond the storage")?);
        }
        Ok(Item::Tensor(Tensor::new(ty, data)))
    }
}

/// The storage that a persistent id `("storage", type, key, place, elements)` names.
fn storage(id: &Item) -> Item {
    let Item::List(parts) = id else { return Item::Opaque };
    match parts.as_slice() {
        [Item::Text(_), Item::Name(dtype), Item::Text(key), ..] => Item::Storage(dtype.clone(), key.clone()),
        _other => Item::Opaque,
    }
}
