//! Who is chosen and who is kept, in plain loops over the rules of a router, from logits in f64.

use moebius_models::config::{GroupScore, Noise, Normalise, Order, Routing, Score};

/// What the rules are applied to.
pub struct Given<'a> {
    /// The router.
    pub routing: Routing,
    /// Choices of a token.
    pub k: usize,
    /// Most slots of an expert.
    pub capacity: Option<usize>,
    /// `[T,E]`.
    pub logits: &'a [f64],
    /// Experts E.
    pub experts: usize,
    /// `[E]`.
    pub selection_bias: Option<&'a [f64]>,
    /// Noise on the choice, `[T,E]`, or `[T,k]` for the random second one.
    pub choice: Option<&'a [f64]>,
    /// `[T,E]`: who stays.
    pub priority: Option<&'a [f64]>,
    /// `[T,k]`, instead of choosing.
    pub chosen: Option<&'a [f64]>,
}

/// What comes out.
#[derive(Debug, PartialEq)]
pub struct Routes {
    /// The expert of every choice, in the order of choices; where experts choose, choice j of a token is expert j.
    pub expert: Vec<Vec<usize>>,
    /// Where a choice went: the place among those its expert keeps.
    pub place: Vec<Vec<Option<usize>>>,
    /// For a mixer: the experts that share the softmax of a choice.
    pub near: Vec<Vec<Vec<bool>>>,
    /// No two numbers that were compared are so close that a rounding could change their order.
    pub clear: bool,
}

/// Scores by their definitions, `[E]`; of a mixer the logits, which order as it does.
fn scores(score: Score, l: &[f64]) -> Vec<f64> {
    let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = l.iter().map(|l| (l - max).exp()).sum();
    let score = |&x: &f64| match score {
        Score::Softmax => (x - max).exp() / sum,
        Score::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Score::SqrtSoftplus => x.exp().ln_1p().sqrt(),
        Score::Identity | Score::SparseMixer => x,
    };
    l.iter().map(score).collect()
}

/// Equal, or further apart than roundings in f32 go.
fn apart(a: f64, b: f64) -> bool {
    let finite = a.is_finite() && b.is_finite();
    a == b
        || !finite
        || (a - b).abs() > 1e-4 * a.abs().max(b.abs()) + 1e-6
        || (a - b).abs() > 1e-3 * a.abs().max(b.abs())
}

/// Indices by descending value, the lower first among equals.
fn ranked(values: &[f64], clear: &mut bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    *clear &= order.windows(2).all(|p| apart(values[p[0]], values[p[1]]));
    order
}

/// The routes of all tokens.
pub fn route(given: &Given<'_>) -> Routes {
    let Given { routing, k, experts: e, .. } = *given;
    let tokens = given.logits.len() / e;
    let k = if routing.expert_choice { e } else { k };
    let mut routes = Routes { expert: Vec::new(), place: Vec::new(), near: Vec::new(), clear: true };
    let mut score = vec![vec![0.0; k]; tokens];
    let mut nowhere = vec![vec![false; k]; tokens];
    for t in 0..tokens {
        let l = &given.logits[t * e..][..e];
        let v = scores(routing.score, l);
        let chosen = match given.chosen {
            _ if routing.expert_choice => (0..e).collect(),
            Some(chosen) => chosen[t * k..][..k].iter().map(|&x| x as usize).collect(),
            None => choose(given, t, k, l, &v, &mut routes.clear),
        };
        routes.near.push(near(&routing, l, &chosen, &mut routes.clear));
        score[t] = chosen.iter().map(|&x| v[x]).collect();
        if let (Noise::RandomSecond, Some(drawn)) = (routing.noise, given.choice) {
            let sum: f64 = if routing.normalise == Normalise::BeforeDropping { score[t].iter().sum() } else { 1.0 };
            for j in 1..k {
                let double = 2.0 * score[t][j] / sum;
                nowhere[t][j] = double <= drawn[t * k + j];
                routes.clear &= apart(double, drawn[t * k + j]);
            }
        }
        routes.expert.push(chosen);
    }
    routes.place = vec![vec![None; k]; tokens];
    for expert in 0..e {
        let mut waiting: Vec<(usize, usize)> = (0..tokens * k).map(|c| (c / k, c % k)).collect();
        waiting.retain(|&(t, j)| routes.expert[t][j] == expert && !nowhere[t][j]);
        let all = waiting.len();
        let most = given.capacity.unwrap_or(all);
        if most < all {
            let mut by_value = |value: &dyn Fn(usize, usize) -> f64| {
                let values: Vec<f64> = waiting.iter().map(|&(t, j)| value(t, j)).collect();
                let order = ranked(&values, &mut routes.clear);
                waiting = order.iter().map(|&i| waiting[i]).collect();
            };
            match (routing.order, given.priority) {
                (Order::Token, _) | (Order::Random, None) => {}
                (Order::Random, Some(priority)) => by_value(&|t, _| priority[t * e + expert]),
                (Order::Probability, _) => by_value(&|t, j| score[t][j]),
                (Order::Choice, _) => waiting.sort_by_key(|&(t, j)| (j, t)),
                (Order::Batch, _) => {
                    by_value(&|t, _| score[t][0]);
                    waiting.sort_by_key(|&(_, j)| j);
                }
            }
        }
        for (place, &(t, j)) in waiting.iter().take(most).enumerate() {
            routes.place[t][j] = Some(place);
        }
    }
    routes
}

/// The choices of token `t`, best first.
fn choose(given: &Given<'_>, t: usize, k: usize, l: &[f64], v: &[f64], clear: &mut bool) -> Vec<usize> {
    let Given { routing, experts: e, .. } = *given;
    let biased = |v: &[f64]| -> Vec<f64> {
        v.iter().enumerate().map(|(x, v)| v + given.selection_bias.map_or(0.0, |b| b[x])).collect()
    };
    let by_score = biased(v);
    let noisy = given.choice.filter(|_| matches!(routing.noise, Noise::Sample | Noise::SampleSecond));
    let by_noise = noisy.map(|n| biased(&(0..e).map(|x| l[x] + n[t * e + x]).collect::<Vec<_>>()));
    let first = match (&by_noise, routing.noise) {
        (Some(by_noise), Noise::Sample) => by_noise.clone(),
        (_, _) => by_score,
    };
    let mut allowed = vec![true; e];
    if routing.groups > 1 {
        let size = e / routing.groups;
        let of_group = |group: &[f64]| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            match routing.group_score {
                GroupScore::Max => group[0],
                GroupScore::Top2Sum => group[0] + group[1],
            }
        };
        let groups: Vec<f64> = first.chunks(size).map(of_group).collect();
        let best = ranked(&groups, clear);
        for &out in &best[routing.group_keep..] {
            allowed[out * size..(out + 1) * size].fill(false);
        }
    }
    let left = |values: &[f64], taken: &[usize]| -> Vec<f64> {
        (0..e).map(|x| if allowed[x] && !taken.contains(&x) { values[x] } else { f64::NEG_INFINITY }).collect()
    };
    match &by_noise {
        Some(by_noise) if routing.noise == Noise::SampleSecond => {
            let mut chosen = vec![ranked(&left(&first, &[]), clear)[0]];
            chosen.extend(&ranked(&left(by_noise, &chosen), clear)[..k - 1]);
            chosen
        }
        Some(_) | None => ranked(&left(&first, &[]), clear)[..k].to_vec(),
    }
}

/// For each choice of a mixer, the experts not taken before it whose distance to the best of them is small.
fn near(routing: &Routing, l: &[f64], chosen: &[usize], clear: &mut bool) -> Vec<Vec<bool>> {
    if routing.score != Score::SparseMixer {
        return Vec::new();
    }
    let mut near = Vec::new();
    for j in 0..chosen.len() {
        let free = |x: usize| !chosen[..j].contains(&x);
        let best = (0..l.len()).filter(|&x| free(x)).map(|x| l[x]).fold(f64::NEG_INFINITY, f64::max);
        let mut of_choice = Vec::new();
        for (x, &l) in l.iter().enumerate() {
            let (distance, most) = (best - l, 2.0 * routing.mixer_eps * best.max(l.abs()));
            *clear &= !free(x) || distance == 0.0 || (distance - most).abs() > 1e-4;
            of_choice.push(free(x) && distance <= most);
        }
        near.push(of_choice);
    }
    near
}
