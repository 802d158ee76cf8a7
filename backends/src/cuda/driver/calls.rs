//! How often the driver was called for what costs time: so that a test can hold that a step waits for nothing.

use std::sync::atomic::{AtomicU64, Ordering};

/// Calls of the driver since a GPU was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverCalls {
    /// Waits for everything on the stream.
    pub synchronisations: u64,
    /// Waits for one copy of a feed, where the host is so far ahead that its memory is still in use.
    pub copy_waits: u64,
    /// Kernels put on the stream one by one, those that were recorded included.
    pub launches: u64,
    /// Recorded plans put on the stream as a whole.
    pub graph_launches: u64,
}

/// Counts [`DriverCalls`].
#[derive(Debug, Default)]
pub(crate) struct Counter {
    pub(crate) synchronisations: AtomicU64,
    pub(crate) copy_waits: AtomicU64,
    pub(crate) launches: AtomicU64,
    pub(crate) graph_launches: AtomicU64,
}

impl Counter {
    /// One more call.
    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The calls so far.
    pub(crate) fn calls(&self) -> DriverCalls {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DriverCalls {
            synchronisations: read(&self.synchronisations),
            copy_waits: read(&self.copy_waits),
            launches: read(&self.launches),
            graph_launches: read(&self.graph_launches),
        }
    }
}
