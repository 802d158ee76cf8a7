//! From expert choices to slots: which choices are kept, and where each expert's segment lies.

/// In which order choices compete for the capacity of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AssignOrder {
    /// All first choices before all second ones, then by token (top-2 of DeepSpeed-MoE and GShard).
    ChoiceMajor,
    /// By token, then by choice.
    TokenMajor,
}

/// The number of slots S: n k when dropless (`capacity` None), else min(n k, e capacity).
pub fn assign_slots(n: usize, k: usize, e: usize, capacity: Option<usize>) -> usize {
    capacity.map_or(n * k, |c| (n * k).min(e.saturating_mul(c)))
}

/// The scratch [`assign`] needs, in i32 elements.
pub fn assign_workspace(n: usize, k: usize, e: usize, prioritised: bool) -> usize {
    e + if prioritised { n * k } else { 0 }
}

/// The expert of a choice; -1 (or anything else outside 0..e) routes nowhere.
#[inline(always)]
fn expert(index: i32, e: usize) -> Option<usize> {
    usize::try_from(index).ok().filter(|&i| i < e)
}

/// Gives every kept choice a slot; returns the number of dropped choices (a choice of no expert is not dropped).
///
/// Expert x keeps its first `capacity` choices, all when None. First means highest `priority` where there is one
/// (NaN lowest), then `order`. Segments are compact: expert x owns the slots `offsets[x]..offsets[x + 1]`, by token and
/// then by choice; slots from `offsets[e]` on are unused.
/// - `expert_index` [n, k]; -1 routes nowhere; `priority` [n, k]
/// - `slot_choice` `[S]`, S = [`assign_slots`], is written: the flat choice t k + j of a slot, -1 when unused
/// - `choice_slot` [n, k] is written: the slot of a choice, -1 when it has none
/// - `offsets` [e + 1] is written
/// - `workspace` has [`assign_workspace`] elements
///
/// A counting sort on the calling thread, O(n k + e) (with priorities, plus a selection for each overfull expert).
/// Panics when the sizes disagree or n k does not fit i32.
pub fn assign(
    expert_index: &[i32],
    n: usize,
    k: usize,
    e: usize,
    order: AssignOrder,
    priority: Option<&[f32]>,
    capacity: Option<usize>,
    slot_choice: &mut [i32],
    choice_slot: &mut [i32],
    offsets: &mut [i32],
    workspace: &mut [i32],
) -> i32 {
    let choices = n * k;
    assert!(i32::try_from(choices).is_ok(), "more choices than i32 holds");
    assert!(expert_index.len() == choices && choice_slot.len() == choices && offsets.len() == e + 1);
    assert!(slot_choice.len() == assign_slots(n, k, e, capacity));
    let (cursor, by_expert) = workspace[..assign_workspace(n, k, e, priority.is_some())].split_at_mut(e);
    // Until slots are known, choice_slot holds 0 for a kept choice and -1 for others, and cursor counts.
    cursor.fill(0);
    for (kept, &x) in choice_slot.iter_mut().zip(expert_index) {
        let expert = expert(x, e);
        *kept = if expert.is_some() { 0 } else { -1 };
        if let Some(x) = expert {
            cursor[x] += 1;
        }
    }
    let routed: i32 = cursor.iter().sum();
    let limit = capacity.map_or(i32::MAX, |c| i32::try_from(c).unwrap_or(i32::MAX));
    if cursor.iter().any(|&count| count > limit) {
        match priority {
            None => keep_first(expert_index, n, k, e, order, limit, choice_slot, cursor),
            Some(priority) => {
                let rule = Rule { n, k, order, priority };
                keep_highest(expert_index, &rule, e, limit, choice_slot, cursor, offsets, by_expert);
            }
        }
    }
    let mut end = 0;
    for x in 0..e {
        offsets[x] = end;
        end += cursor[x];
        cursor[x] = offsets[x];
    }
    offsets[e] = end;
    slot_choice[end as usize..].fill(-1);
    for (c, (slot, &x)) in choice_slot.iter_mut().zip(expert_index).enumerate() {
        if *slot == 0 {
            let next = &mut cursor[x as usize];
            *slot = *next;
            slot_choice[*next as usize] = c as i32;
            *next += 1;
        }
    }
    routed - end
}

/// Drops what comes after the first `limit` choices of an expert in `order`; leaves the kept counts in `count`.
fn keep_first(
    expert_index: &[i32],
    n: usize,
    k: usize,
    e: usize,
    order: AssignOrder,
    limit: i32,
    kept: &mut [i32],
    count: &mut [i32],
) {
    count.fill(0);
    let mut visit = |c: usize| {
        if let Some(x) = expert(expert_index[c], e) {
            if count[x] < limit {
                count[x] += 1;
            } else {
                kept[c] = -1;
            }
        }
    };
    match order {
        AssignOrder::TokenMajor => (0..n * k).for_each(visit),
        AssignOrder::ChoiceMajor => {
            for j in 0..k {
                (0..n).for_each(|t| visit(t * k + j));
            }
        }
    }
}

/// Which of two choices of one expert is kept first.
struct Rule<'a> {
    n: usize,
    k: usize,
    order: AssignOrder,
    priority: &'a [f32],
}

impl Rule<'_> {
    fn rank(&self, c: i32) -> usize {
        let c = c as usize;
        match self.order {
            AssignOrder::TokenMajor => c,
            AssignOrder::ChoiceMajor => c % self.k * self.n + c / self.k,
        }
    }

    fn compare(&self, a: i32, b: i32) -> std::cmp::Ordering {
        // + 0.0 makes the two zeros equal under the total order.
        let key = |c: i32| match self.priority[c as usize] {
            p if p.is_nan() => f32::NEG_INFINITY,
            p => p + 0.0,
        };
        key(b).total_cmp(&key(a)).then_with(|| self.rank(a).cmp(&self.rank(b)))
    }
}

/// Drops all but the `limit` choices of each expert that come first by `rule`; `count` holds all its choices before
/// and the kept ones after. `next` [e + 1] and `by_expert` [n k] are scratch.
fn keep_highest(
    expert_index: &[i32],
    rule: &Rule<'_>,
    e: usize,
    limit: i32,
    kept: &mut [i32],
    count: &mut [i32],
    next: &mut [i32],
    by_expert: &mut [i32],
) {
    assert!(rule.priority.len() == expert_index.len());
    let mut end = 0;
    for x in 0..e {
        next[x] = end;
        end += count[x];
    }
    for (c, &x) in expert_index.iter().enumerate() {
        if let Some(x) = expert(x, e) {
            by_expert[next[x] as usize] = c as i32;
            next[x] += 1;
        }
    }
    for x in 0..e {
        if count[x] > limit {
            let mine = &mut by_expert[(next[x] - count[x]) as usize..next[x] as usize];
            let limit_at = limit as usize;
            mine.select_nth_unstable_by(limit_at, |&a, &b| rule.compare(a, b));
            mine[limit_at..].iter().for_each(|&c| kept[c as usize] = -1);
            count[x] = limit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::par::tests::Rng;
    use super::*;

    struct Assigned {
        slot_choice: Vec<i32>,
        choice_slot: Vec<i32>,
        offsets: Vec<i32>,
        dropped: i32,
    }

    fn run(
        index: &[i32],
        (n, k, e): (usize, usize, usize),
        order: AssignOrder,
        priority: Option<&[f32]>,
        capacity: Option<usize>,
    ) -> Assigned {
        let mut slot_choice = vec![-99; assign_slots(n, k, e, capacity)];
        let (mut choice_slot, mut offsets) = (vec![-99; n * k], vec![-99; e + 1]);
        let mut workspace = vec![-99; assign_workspace(n, k, e, priority.is_some())];
        let out = (&mut slot_choice[..], &mut choice_slot[..], &mut offsets[..]);
        let dropped = assign(index, n, k, e, order, priority, capacity, out.0, out.1, out.2, &mut workspace);
        Assigned { slot_choice, choice_slot, offsets, dropped }
    }

    /// Sorts all choices by the full rule, takes the first `capacity` per expert, and lists them by token.
    fn check(
        index: &[i32],
        (n, k, e): (usize, usize, usize),
        order: AssignOrder,
        priority: Option<&[f32]>,
        capacity: Option<usize>,
    ) {
        let got = run(index, (n, k, e), order, priority, capacity);
        let (mut offset, mut dropped, mut slots, mut slot_of) = (0, 0, vec![], vec![-1; n * k]);
        for x in 0..e {
            let mut mine: Vec<usize> = (0..n * k).filter(|&c| index[c] == x as i32).collect();
            mine.sort_by(|&a, &b| {
                let rank = |c: usize| match order {
                    AssignOrder::ChoiceMajor => (c % k, c / k),
                    AssignOrder::TokenMajor => (c / k, c % k),
                };
                let p = |c: usize| priority.map_or(0.0, |p| p[c]);
                p(b).partial_cmp(&p(a)).unwrap().then(rank(a).cmp(&rank(b)))
            });
            let kept = mine.len().min(capacity.unwrap_or(usize::MAX));
            dropped += mine.len() - kept;
            mine.truncate(kept);
            mine.sort_unstable();
            assert_eq!(got.offsets[x], offset);
            for c in mine {
                slot_of[c] = offset;
                slots.push(c as i32);
                offset += 1;
            }
        }
        slots.resize(got.slot_choice.len(), -1);
        assert_eq!(got.offsets[e], offset);
        assert_eq!((got.slot_choice, got.choice_slot, got.dropped), (slots, slot_of, dropped as i32));
    }

    #[test]
    fn against_sorting() {
        let mut rng = Rng(4);
        let sizes = [(1, 1, 1), (1, 4, 4), (9, 1, 5), (40, 2, 3), (100, 3, 16), (64, 2, 64), (0, 2, 4)];
        for (n, k, e) in sizes {
            for round in 0..6 {
                // Distinct experts per token; every third round on the low half only, so that others stay empty.
                let mut index = vec![];
                for _ in 0..n {
                    let mut all: Vec<i32> = (0..e as i32).collect();
                    let among = if round % 3 == 2 { (e / 2).max(k.min(e)) } else { e };
                    for j in 0..k.min(e) {
                        let other = j + rng.below(among - j);
                        all.swap(j, other);
                    }
                    index.extend_from_slice(&all[..k]);
                    if round % 2 == 1 && rng.below(4) == 0 {
                        *index.last_mut().unwrap() = -1;
                    }
                }
                // Few distinct priorities, so that ties occur.
                let priority: Vec<f32> = (0..n * k).map(|_| rng.below(3) as f32 - 1.0).collect();
                for order in [AssignOrder::ChoiceMajor, AssignOrder::TokenMajor] {
                    for capacity in [None, Some(0), Some(1), Some(5), Some(n * k / e.max(1)), Some(n), Some(usize::MAX)]
                    {
                        check(&index, (n, k, e), order, None, capacity);
                        check(&index, (n, k, e), order, Some(&priority), capacity);
                    }
                }
            }
        }
    }

    #[test]
    fn all_tokens_on_one_expert() {
        let index = [2; 50];
        check(&index, (50, 1, 4), AssignOrder::TokenMajor, None, Some(7));
        let got = run(&index, (50, 1, 4), AssignOrder::ChoiceMajor, None, Some(7));
        assert_eq!((got.offsets, got.dropped, got.slot_choice.len()), (vec![0, 0, 0, 7, 7], 43, 28));
    }

    #[test]
    fn first_choices_come_before_second_ones() {
        // Token 0 has expert 0 as its second choice, token 1 as its first: one place.
        let index = [1, 0, 0, 1];
        let choice = run(&index, (2, 2, 2), AssignOrder::ChoiceMajor, None, Some(1));
        assert_eq!(choice.choice_slot, [1, -1, 0, -1]);
        let token = run(&index, (2, 2, 2), AssignOrder::TokenMajor, None, Some(1));
        assert_eq!(token.choice_slot, [1, 0, -1, -1]);
    }

    #[test]
    fn nan_priority_is_the_lowest_and_strange_experts_route_nowhere() {
        let priority = [f32::NAN, -1.0, f32::NAN, f32::INFINITY];
        let got = run(&[0, 0, 0, 0], (4, 1, 1), AssignOrder::TokenMajor, Some(&priority), Some(3));
        assert_eq!(got.choice_slot, [0, 1, -1, 2]);
        let got = run(&[7, -5, i32::MAX, i32::MIN, 1], (5, 1, 2), AssignOrder::TokenMajor, None, None);
        assert_eq!((got.choice_slot, got.dropped), (vec![-1, -1, -1, -1, 0], 0));
    }
}
