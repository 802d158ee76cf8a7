//! Bins of steps that double in width whenever there would be too many of them: one pass, bounded memory, any length.

/// What can be gathered in a bin.
pub(super) trait Merge {
    /// Takes in what came later.
    fn merge(&mut self, later: Self);
}

/// At most `cap` bins over steps 0, 1, 2, ...
#[derive(Debug, Clone)]
pub(super) struct Bins<T> {
    cap: usize,
    width: u64,
    bins: Vec<Option<T>>,
}

impl<T: Merge> Bins<T> {
    pub(super) fn new(cap: usize) -> Self {
        Self { cap, width: 1, bins: Vec::new() }
    }

    pub(super) fn add(&mut self, step: u64, value: T) {
        while step / self.width >= self.cap as u64 {
            self.halve();
        }
        let at = (step / self.width) as usize;
        if self.bins.len() <= at {
            self.bins.resize_with(at + 1, || None);
        }
        match &mut self.bins[at] {
            Some(bin) => bin.merge(value),
            empty => *empty = Some(value),
        }
    }

    /// Merges neighbours until there are at most `cap` bins.
    pub(super) fn at_most(mut self, cap: usize) -> Self {
        while self.bins.len() > cap.max(1) {
            self.halve();
        }
        self
    }

    fn halve(&mut self) {
        let mut old = std::mem::take(&mut self.bins).into_iter();
        while let Some(first) = old.next() {
            let second = old.next().flatten();
            self.bins.push(match (first, second) {
                (Some(mut first), Some(second)) => {
                    first.merge(second);
                    Some(first)
                }
                (first, second) => first.or(second),
            });
        }
        self.width *= 2;
    }

    /// Steps per bin.
    pub(super) fn width(&self) -> u64 {
        self.width
    }

    /// Bin by bin; none where no step was added.
    pub(super) fn all(&self) -> &[Option<T>] {
        &self.bins
    }

    /// Bins that have something.
    pub(super) fn filled(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.bins.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Merge for (u64, u64) {
        fn merge(&mut self, later: Self) {
            self.0 += later.0;
            self.1 = later.1;
        }
    }

    #[test]
    fn nothing_is_lost_and_the_number_is_bounded() {
        let mut bins = Bins::new(10);
        for step in (1..=1000).filter(|step| step % 3 != 0) {
            bins.add(step, (1, step));
            assert!(bins.all().len() <= 10);
        }
        assert_eq!(bins.filled().map(|bin| bin.0).sum::<u64>(), 667);
        assert_eq!(bins.width(), 128);
        assert_eq!(bins.all()[0], Some((85, 127)));
        let few = bins.at_most(3);
        assert_eq!((few.all().len(), few.width()), (2, 512));
        assert_eq!(few.filled().map(|bin| bin.0).sum::<u64>(), 667);
    }
}
