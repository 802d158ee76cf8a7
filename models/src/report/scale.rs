//! Axes: from values to pixels, round ticks, and numbers as people write them.

/// One axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    from: f64,
    to: f64,
    log: bool,
    pixel_from: f64,
    pixel_to: f64,
}

impl Scale {
    /// An axis over [from, to] onto pixels. An empty range is widened, so that a constant is drawn as a line.
    pub(crate) fn new(range: (f64, f64), log: bool, pixels: (f64, f64)) -> Self {
        let (mut from, mut to) = range;
        if to - from <= f64::EPSILON * to.abs().max(from.abs()) {
            let room = if to == 0.0 { 1.0 } else { to.abs() * 0.1 };
            (from, to) = (from - room, to + room);
        }
        Self { from, to, log: log && from > 0.0, pixel_from: pixels.0, pixel_to: pixels.1 }
    }

    /// Widens a linear axis to the next ticks, a logarithmic one by a little.
    pub(crate) fn rounded(self, ticks: usize) -> Self {
        if self.log {
            let room = (self.to / self.from).powf(0.04);
            return Self { from: self.from / room, to: self.to * room, ..self };
        }
        let step = round_step(self.to - self.from, ticks);
        Self { from: (self.from / step).floor() * step, to: (self.to / step).ceil() * step, ..self }
    }

    pub(crate) fn pixel(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.from) / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.pixel_from + share.clamp(0.0, 1.0) * (self.pixel_to - self.pixel_from)
    }

    /// About `count` round values inside the axis, with their text.
    pub(crate) fn ticks(&self, count: usize) -> Vec<(f64, String)> {
        let values = if self.log { self.log_ticks(count) } else { self.linear_ticks(count) };
        let step = values.windows(2).map(|w| w[1] - w[0]).fold(f64::INFINITY, f64::min);
        let largest = values.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
        let text = |&value: &f64| (value, if self.log { short(value) } else { tick_text(value, step, largest) });
        values.iter().map(text).collect()
    }

    fn linear_ticks(&self, count: usize) -> Vec<f64> {
        let step = round_step(self.to - self.from, count);
        let first = (self.from / step - 1e-9).ceil() as i64;
        let last = (self.to / step + 1e-9).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }

    fn log_ticks(&self, count: usize) -> Vec<f64> {
        const CHOICES: [&[f64]; 4] =
            [&[1.0], &[1.0, 3.0], &[1.0, 2.0, 5.0], &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0]];
        let decades = self.from.log10().floor() as i32..=self.to.log10().ceil() as i32;
        let of = |marks: &&[f64]| -> Vec<f64> {
            let all = decades.clone().flat_map(|ten| marks.iter().map(move |mark| mark * 10f64.powi(ten)));
            all.filter(|value| (self.from..=self.to).contains(value)).collect()
        };
        let mut best = of(&CHOICES[0]);
        for marks in &CHOICES[1..] {
            let ticks = of(marks);
            if best.len() >= 3 || ticks.len() > 2 * count {
                break;
            }
            best = ticks;
        }
        // Too narrow for any of the marks, or too many decades.
        if best.len() < 2 {
            return self.linear_ticks(count);
        }
        let every = best.len().div_ceil(count + 2);
        best.into_iter().step_by(every).collect()
    }
}

/// 1, 2 or 5 times a power of ten, such that `span` has at most about `count` of them.
pub(crate) fn round_step(span: f64, count: usize) -> f64 {
    let raw = span / count.max(1) as f64;
    let ten = 10f64.powf(raw.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter().find(|times| times * ten >= raw * 0.999);
    times.unwrap_or(10.0) * ten
}

/// `largest` is the largest of the axis: all of its ticks are written the same way.
fn tick_text(value: f64, step: f64, largest: f64) -> String {
    if value.abs() < step * 1e-6 {
        return "0".to_owned();
    }
    if largest < 5e-3 {
        return scientific(value, (largest / step).log10().ceil().clamp(0.0, 9.0) as usize);
    }
    let (divisor, unit) = match value.abs() {
        v if v >= 1e9 => (1e9, "G"),
        v if v >= 1e6 => (1e6, "M"),
        v if v >= 1e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    // As many decimals as the step needs, so that neighbours differ.
    let decimals = (0..12).find(|&d| (step / divisor * 10f64.powi(d) + 1e-9).fract() < 1e-6).unwrap_or(12);
    trim(format!("{:.*}", decimals as usize, value / divisor)) + unit
}

/// Three or four digits and a unit: 0.0123, 1.62, 12.3k, 1.12M, 3e-4.
pub(crate) fn short(value: f64) -> String {
    if !value.is_finite() {
        return "not finite".to_owned();
    }
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")];
    if let Some((from, unit)) = units.into_iter().find(|(from, _)| value.abs() >= *from) {
        let scaled = value / if unit == "k" { 1e3 } else { from };
        return digits(scaled, 3) + unit;
    }
    if value != 0.0 && value.abs() < 1e-3 { scientific(value, 2) } else { digits(value, 4) }
}

fn scientific(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => format!("{}e{exponent}", trim(mantissa.to_owned())),
        None => text,
    }
}

/// `count` significant digits, without zeros at the end.
fn digits(value: f64, count: i32) -> String {
    let size = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    trim(format!("{:.*}", (count - 1 - size).max(0) as usize, value))
}

fn trim(text: String) -> String {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// 1,234,567.
pub(crate) fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(scale: Scale, count: usize) -> Vec<String> {
        scale.ticks(count).into_iter().map(|tick| tick.1).collect()
    }

    #[test]
    fn ticks_are_round() {
        let linear = |from, to| texts(Scale::new((from, to), false, (0.0, 100.0)), 5);
        assert_eq!(linear(0.0, 1000.0), ["0", "200", "400", "600", "800", "1k"]);
        assert_eq!(linear(0.0, 7300.0), ["0", "2k", "4k", "6k"]);
        assert_eq!(linear(1.61, 1.74), ["1.65", "1.7"]);
        assert_eq!(linear(0.0, 3e-4), ["0", "1e-4", "2e-4", "3e-4"]);
        assert_eq!(linear(0.0, 1e-3), ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]);
        assert_eq!(linear(1.6231, 1.6249), ["1.6235", "1.624", "1.6245"]);
        assert_eq!(texts(Scale::new((1.5, 5.6), true, (0.0, 1.0)), 5), ["1.5", "2", "2.5", "3", "4", "5"]);
        assert_eq!(texts(Scale::new((0.02, 300.0), true, (0.0, 1.0)), 5), ["0.1", "1", "10", "100"]);
    }

    #[test]
    fn values_land_inside() {
        let scale = Scale::new((2.0, 2.0), false, (100.0, 0.0)).rounded(4);
        assert!((scale.pixel(2.0) - 50.0).abs() < 1.0);
        let log = Scale::new((1.0, 100.0), true, (0.0, 10.0));
        assert_eq!((log.pixel(10.0), log.pixel(1e9), log.pixel(-1.0)), (5.0, 10.0, 0.0));
    }

    #[test]
    fn numbers_read_well() {
        let pairs =
            [(1.6234567, "1.623"), (0.0, "0"), (12345.0, "12.3k"), (2.5e6, "2.5M"), (3e-4, "3e-4"), (0.5, "0.5")];
        pairs.iter().for_each(|&(value, text)| assert_eq!(short(value), text));
        assert_eq!(short(1234.0), "1234");
        assert_eq!([grouped(0), grouped(999), grouped(1_234_567)], ["0", "999", "1,234,567"]);
    }
}
