//! How inputs are made from valid ones: bytes, numbers, words and lines are changed, moved and taken over from others.

use moebius_ir::philox::philox4x32_10;

use super::Target;

/// Random words: a pure function of seed, target, input and how many were drawn before.
pub struct Words {
    key: [u32; 2],
    counter: [u32; 4],
    block: [u32; 4],
    used: usize,
}

impl Words {
    /// The words of one input.
    pub fn new(seed: u64, target: u32, index: u64) -> Words {
        let counter = [index as u32, (index >> 32) as u32, target, 0];
        Words { key: [seed as u32, (seed >> 32) as u32], counter, block: [0; 4], used: 4 }
    }

    /// The next word.
    pub fn word(&mut self) -> u32 {
        if self.used == 4 {
            self.block = philox4x32_10(self.key, self.counter);
            self.counter[3] += 1;
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// A number below `n`, 0 for `n` of 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.word()) * n as u64) >> 32) as usize
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of a list that is not empty.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// A range of `0..len`, mostly short.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        let most = if self.once_in(4) { len } else { 16 };
        start..(start + self.below(most + 1)).min(len)
    }
}

/// Numbers at the edges of types.
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "2",
    "3",
    "4",
    "7",
    "8",
    "64",
    "255",
    "256",
    "65536",
    "1000000",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "4611686018427387904",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-1",
    "-0",
    "-9223372036854775808",
    "0.5",
    "-0.0",
    "1e39",
    "1e-46",
    "1e308",
    "1e309",
    "1e-320",
    "nan",
    "inf",
    "null",
    "00",
    "1_0",
];

/// An input: mostly a valid one with some changes, sometimes bytes or words without order.
pub(super) fn input(target: &Target, words: &mut Words) -> Vec<u8> {
    if words.once_in(32) {
        return (0..words.below(256)).map(|_| words.word() as u8).collect();
    }
    if words.once_in(32) {
        let n = words.below(64);
        return (0..n).flat_map(|_| words.pick(&target.words).clone().into_bytes()).collect();
    }
    let mut input = words.pick(&target.seeds).clone();
    let changes = [0, 1, 1, 1, 2, 2, 3, 8][words.below(8)];
    for _ in 0..changes {
        change(target, words, &mut input);
    }
    input
}

fn change(target: &Target, words: &mut Words, input: &mut Vec<u8>) {
    let len = input.len();
    match words.below(12) {
        0 if len > 0 => {
            let at = words.below(len);
            input[at] ^= 1 << words.below(8);
        }
        1 if len > 0 => {
            let at = words.below(len);
            input[at] = words.word() as u8;
        }
        2 => drop(input.drain(words.range(len))),
        3 => {
            let part = input[words.range(len)].to_vec();
            let at = words.below(len + 1);
            let times = if words.once_in(16) { 1 + words.below(200) } else { 1 };
            drop(input.splice(at..at, part.repeat(times)));
        }
        4 => {
            let word = words.pick(&target.words).clone();
            let at = words.below(len + 1);
            drop(input.splice(at..at, word.into_bytes()));
        }
        5..=7 => {
            let number = (*words.pick(NUMBERS)).as_bytes().to_vec();
            replace_run(words, input, |b| b.is_ascii_digit(), &number);
        }
        8 => {
            let word = words.pick(&target.words).clone().into_bytes();
            replace_run(words, input, |b| b.is_ascii_alphabetic() || b == b'_', &word);
        }
        9 => lines(words, input),
        10 => {
            // A part of another valid input.
            let other = words.pick(&target.seeds);
            let part = other[words.range(other.len())].to_vec();
            let range = words.range(len);
            drop(input.splice(range, part));
        }
        _ => {
            // The beginning of this one, the end of another, both at a line.
            let other = words.pick(&target.seeds);
            let cut = line_starts(input);
            let from = line_starts(other);
            let (cut, from) = (*words.pick(&cut), *words.pick(&from));
            input.truncate(cut);
            input.extend_from_slice(&other[from..]);
        }
    }
}

fn line_starts(text: &[u8]) -> Vec<usize> {
    let after = text.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1);
    [0].into_iter().chain(after).collect()
}

/// Replaces one of the runs of bytes of a kind.
fn replace_run(words: &mut Words, input: &mut Vec<u8>, kind: impl Fn(u8) -> bool, by: &[u8]) {
    let from = words.below(input.len() + 1);
    let Some(start) = (from..input.len()).find(|&i| kind(input[i])) else { return };
    let start = (0..start).rev().find(|&i| !kind(input[i])).map_or(0, |i| i + 1);
    let end = (start..input.len()).find(|&i| !kind(input[i])).unwrap_or(input.len());
    drop(input.splice(start..end, by.iter().copied()));
}

/// Takes a line away, doubles it, or exchanges two.
fn lines(words: &mut Words, input: &mut Vec<u8>) {
    let mut all: Vec<Vec<u8>> = input.split_inclusive(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    if all.is_empty() {
        return;
    }
    let (a, b) = (words.below(all.len()), words.below(all.len()));
    match words.below(3) {
        0 => drop(all.remove(a)),
        1 => all.insert(b, all[a].clone()),
        _ => all.swap(a, b),
    }
    *input = all.concat();
}
