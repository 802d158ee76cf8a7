//! Token ids in memory or in a mapped file, behind one way of reading.

use std::ops::Range;

use memmap2::Mmap;

/// The bytes behind ids.
#[derive(Debug)]
pub(super) enum Bytes {
    /// Built into the program.
    Static(&'static [u8]),
    /// A mapped file.
    Map(Mmap),
}

impl Bytes {
    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Static(bytes) => bytes,
            Self::Map(map) => map,
        }
    }
}

/// How an id lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    /// One byte: text without a tokenizer.
    U8,
    /// Two bytes, little endian.
    U16,
    /// Four bytes, little endian.
    U32,
}

impl Width {
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// The ids of one text, in order.
#[derive(Debug)]
pub(super) struct TokenStore {
    pub(super) data: Bytes,
    pub(super) width: Width,
    /// Where in `data` the ids lie.
    pub(super) ids: Range<usize>,
    /// Where in `data` the number of text bytes of each id lies (one byte each); without it every id is one byte of text.
    pub(super) lens: Option<Range<usize>>,
    /// Highest id in the text; larger values read later (the file was changed meanwhile) are cut to it.
    pub(super) max_id: u32,
}

impl TokenStore {
    pub(super) fn len(&self) -> usize {
        self.ids.len() / self.width.bytes()
    }

    /// Copies ids from `start` on.
    pub(super) fn read(&self, start: usize, out: &mut [i32]) {
        let width = self.width.bytes();
        let bytes = &self.data.as_slice()[self.ids.clone()][start * width..(start + out.len()) * width];
        let cut = |id: u32| id.min(self.max_id) as i32;
        match self.width {
            Width::U8 => out.iter_mut().zip(bytes).for_each(|(o, &b)| *o = cut(u32::from(b))),
            Width::U16 => out
                .iter_mut()
                .zip(bytes.as_chunks::<2>().0)
                .for_each(|(o, &b)| *o = cut(u32::from(u16::from_le_bytes(b)))),
            Width::U32 => {
                out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, &b)| *o = cut(u32::from_le_bytes(b)));
            }
        }
    }

    /// Bytes of text behind the ids of a range.
    pub(super) fn text_bytes(&self, range: Range<usize>) -> u64 {
        match &self.lens {
            None => range.len() as u64,
            Some(lens) => self.data.as_slice()[lens.clone()][range].iter().map(|&n| u64::from(n)).sum(),
        }
    }
}
