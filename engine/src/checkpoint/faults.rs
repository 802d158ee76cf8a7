//! Faults of a disk for the tests: a disk that fills up, and a process killed between any two changes.

use std::{cell::Cell, io};

/// Which fault, and when.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// Changes until the process is dead, after which no change happens any more. `None`: it lives.
    pub(super) die_after: Cell<Option<u64>>,
    /// Bytes until the disk is full. `None`: it never is.
    pub(super) room: Cell<Option<usize>>,
    /// Changes made so far.
    pub(super) changes: Cell<u64>,
}

impl Faults {
    pub(super) fn change(&self, bytes: usize) -> io::Result<()> {
        if let Some(left) = self.die_after.get() {
            if left == 0 {
                return Err(io::Error::other("killed"));
            }
            self.die_after.set(Some(left - 1));
        }
        if let Some(room) = self.room.get() {
            if bytes > room {
                self.room.set(Some(0));
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room.set(Some(room - bytes));
        }
        self.changes.set(self.changes.get() + 1);
        Ok(())
    }
}
