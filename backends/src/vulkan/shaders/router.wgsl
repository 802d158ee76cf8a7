// What routing knows of one token: a thread works on it. SCORE: 0 softmax, 1 sigmoid, 2 square root of
// softplus, 3 identity, 4 SparseMixer, the last with `jitter()`, twice its epsilon.

const NORMALISED: bool = SCORE == 1u || SCORE == 2u;
const TINY: f32 = 1.17549435e-38f;

// Where the token's logits begin; the largest of them, and the sum of e^(l - largest).
var<private> row: u32;
var<private> greatest: f32;
var<private> total: f32;

fn logit(e: u32) -> f32 { return get_logits(row + e); }

fn look_at(t: u32) {
    row = t * p.experts;
    greatest = -inf();
    for (var e = 0u; e < p.experts; e++) { greatest = max_nan(greatest, logit(e)); }
    total = 0.0f;
    for (var e = 0u; e < p.experts; e++) { total += e_to(logit(e) - greatest); }
}
// No NaN, and the largest logit is finite.
fn all_finite() -> bool { return !is_nan(total); }
fn softmax(l: f32) -> f32 { return divide(e_to(l - greatest), total); }

fn sigmoid(x: f32) -> f32 {
    let e = e_to(-abs(x));
    let large = 1.0f / (1.0f + e);
    return select(large, e * large, x < 0.0f);
}
// The score value of one expert by itself; of the others the logit.
fn own_value(l: f32) -> f32 {
    if (SCORE == 1u) { return sigmoid(l); }
    if (SCORE == 2u) { return sqrt(max(l, 0.0f) + ln_1p(e_to(-abs(l)))); }
    return l;
}
// Its derivative.
fn own_slope(l: f32, value: f32) -> f32 {
    if (SCORE == 1u) { return value * sigmoid(-l); }
    if (SCORE == 2u) { return select(0.0f, sigmoid(l) / (2.0f * value), value > 0.0f); }
    return 1.0f;
}
fn sum_of_values() -> f32 {
    var sum = 0.0f;
    for (var e = 0u; e < p.experts; e++) { sum += own_value(logit(e)); }
    return sum;
}

// Sets of experts.
const WORDS: u32 = MOST_EXPERTS / 32u;
// SparseMixer's choices so far.
var<private> taken: array<u32, WORDS>;

fn take(e: u32) { taken[e / 32u] |= 1u << (e % 32u); }
fn left_of(e: u32) -> f32 { return select(logit(e), -inf(), (taken[e / 32u] >> (e % 32u) & 1u) == 1u); }

// SparseMixer's softmax over the logits that are left (taken ones are -inf): the best of them and the sum of the weights.
var<private> mixer_best: f32;
var<private> mixer_sum: f32;

fn mixer_weight(l: f32) -> f32 {
    let near = l > -inf() && mixer_best - l <= jitter() * max(mixer_best, abs(l));
    return select(0.0f, e_to(l - mixer_best), near);
}
fn mixer_share(l: f32) -> f32 { return select(0.0f, mixer_weight(l) / mixer_sum, mixer_sum > 0.0f); }
fn look_at_mixer() {
    mixer_best = -inf();
    mixer_sum = 0.0f;
    for (var e = 0u; e < p.experts; e++) { mixer_best = max_nan(mixer_best, left_of(e)); }
    if (mixer_best == -inf()) { return; }
    for (var e = 0u; e < p.experts; e++) { mixer_sum += mixer_weight(left_of(e)); }
}
