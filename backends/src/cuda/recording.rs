//! A sequence of the stream as one graph of the driver.

use std::sync::Arc;

use cust::sys;

use super::device::Device;
use super::driver::{Counter, check};
use super::error::CudaError;
use crate::Result;

/// A recorded sequence, ready to be replayed as often as wanted.
pub(super) struct Recording {
    device: Arc<Device>,
    graph: sys::CUgraphExec,
}

// SAFETY: a handle of the driver, used by one thread at a time.
unsafe impl Send for Recording {}

impl Recording {
    /// Records what `sequence` puts on the stream of `device`, without carrying it out. The stream must be held.
    pub(super) fn of(device: &Arc<Device>, sequence: impl FnOnce() -> Result<()>) -> Result<Recording> {
        let stream = device.raw_stream();
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live and nothing else is put on it while it is held.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        let recorded = sequence();
        let mut graph = std::ptr::null_mut();
        // SAFETY: ends what was begun above, whatever became of it; the pointer is valid.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream, &mut graph) });
        let whole = recorded.and_then(|()| Ok(ended?));
        let made = whole.and_then(|()| Ok(instantiate(graph)?));
        if !graph.is_null() {
            // SAFETY: made by the end of the recording; what was instantiated from it stays. A failure leaves nothing to do.
            let _ = unsafe { sys::cuGraphDestroy(graph) };
        }
        Ok(Recording { device: Arc::clone(device), graph: made? })
    }

    /// Puts the sequence on the stream.
    pub(super) fn replay(&self, device: &Device) -> Result<(), CudaError> {
        Counter::count(&device.counter.graph_launches);
        // SAFETY: a live graph of this device, whose addresses its owner keeps valid.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.graph, device.raw_stream()) })
    }
}

fn instantiate(graph: sys::CUgraph) -> Result<sys::CUgraphExec, CudaError> {
    let mut made = std::ptr::null_mut();
    // SAFETY: the graph was just recorded; the pointer is valid.
    check("cuGraphInstantiateWithFlags", unsafe { sys::cuGraphInstantiateWithFlags(&mut made, graph, 0) })?;
    Ok(made)
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: made in `of`, and not used afterwards; the driver waits for a replay that still runs.
            let _ = unsafe { sys::cuGraphExecDestroy(self.graph) };
        }
    }
}
