//! Ctrl-C, SIGTERM and a terminal that is closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::INTERRUPTED;
use crate::text::note;

/// A flag that the first of these signals sets, saying `what` is done about it; a second one ends the program at once. What the
/// program does from here on must look at the flag.
pub(crate) fn asked(what: &'static str) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    let handler = ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
        note!("\n{what} (press Ctrl-C again to stop at once) ...");
    });
    if let Err(error) = handler {
        note!("moebius: warning: Ctrl-C will end the program at once: {error}");
    }
    stop
}
