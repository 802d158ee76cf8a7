//! Numbers as people read them.

use std::time::Duration;

/// Prints a line for people on standard error. Unlike `eprintln`, it goes on when nobody listens any more: a terminal that
/// was closed must not end a run.
macro_rules! note {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        let _closed = writeln!(std::io::stderr(), $($part)*);
    }};
}
pub(crate) use note;

/// Prints what a device has to tell.
pub(crate) fn notes(engine: &moebius::Engine) {
    engine.take_notes().iter().for_each(|text| note!("moebius: note: {text}"));
}

/// `4.12 B`, `356 M`, `12.5 k`.
pub(crate) fn count(n: f64) -> String {
    for (limit, unit) in [(1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")] {
        if n >= limit {
            return format!("{}{unit}", three_digits(n / limit));
        }
    }
    format!("{n:.0}")
}

/// `1.5 GB`, in powers of ten.
pub(crate) fn bytes(n: f64) -> String {
    for (limit, unit) in [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")] {
        if n >= limit {
            return format!("{} {unit}", three_digits(n / limit));
        }
    }
    format!("{n:.0} bytes")
}

fn three_digits(n: f64) -> String {
    if n >= 100.0 {
        format!("{n:.0}")
    } else if n >= 10.0 {
        format!("{n:.1}")
    } else {
        format!("{n:.2}")
    }
}

/// `2 h 05 min`, `3 min 20 s`, `12 s`.
pub(crate) fn duration(d: Duration) -> String {
    let seconds = d.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_are_shown() {
        assert_eq!(count(4_115_000_000.0), "4.12 B");
        assert_eq!(count(356e6), "356 M");
        assert_eq!(count(999.0), "999");
        assert_eq!(bytes(12_500.0), "12.5 kB");
        assert_eq!(duration(Duration::from_secs(200)), "3 min 20 s");
    }
}
