//! Ctrl-C: the first one asks, the second one ends the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::INTERRUPTED;
use crate::text::note;

/// A flag that the first Ctrl-C (or SIGTERM, or a terminal that is closed) sets; a second one ends the program at once. `when` says
/// to people when the program looks at it.
pub(crate) fn stop_flag(when: &'static str) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    let handler = ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
        note!("\nstopping {when} (press Ctrl-C again to stop at once) ...");
    });
    if let Err(error) = handler {
        note!("moebius: warning: Ctrl-C will not save a checkpoint: {error}");
    }
    stop
}
