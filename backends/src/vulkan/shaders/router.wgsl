// What routing knows of one token: LANES threads work on it, of which each has the experts lane, lane + LANES and so on, up to OWN_EXPERTS of
// them; a workgroup has TOKENS tokens at a time. The order of a sum depends on the number of experts alone. SCORE: 0 softmax, 1 sigmoid,
// 2 square root of softplus, 3 identity, 4 SparseMixer, the last with `jitter()`, twice its epsilon.
//
// What is named after lanes is called by all threads of a workgroup at once. Sums, maxima and the best over a token's lanes are in
// router_lanes.wgsl or router_apart.wgsl.

const NORMALISED: bool = SCORE == 1u || SCORE == 2u;
const TINY: f32 = 1.17549435e-38f;

var<workgroup> room_of_tokens: array<f32, THREADS>;
var<workgroup> room_of_choices: array<i32, THREADS>;

var<private> lane: u32;
// The first thread of the token, and where its logits begin; those of the lane, and e^(l - largest) of them; the largest of all, and the
// sum of e^(l - largest).
var<private> first: u32;
var<private> row: u32;
var<private> own: array<f32, OWN_EXPERTS>;
var<private> weights: array<f32, OWN_EXPERTS>;
var<private> greatest: f32;
var<private> total: f32;

fn logit(e: u32) -> f32 { return get_logits(row + e); }
// The lane's i-th expert, and whether there is one.
fn expert_of_lane(i: u32) -> u32 { return i * LANES + lane; }
fn has(i: u32) -> bool { return i * LANES + lane < p.experts; }

// Over the same lane of all tokens of the workgroup.
fn tokens_sum_of_lanes(thread: u32, x: f32) -> f32 {
    room_of_tokens[thread] = x;
    workgroupBarrier();
    var sum = 0.0f;
    for (var s = 0u; s < TOKENS; s++) { sum += room_of_tokens[s * LANES + lane]; }
    workgroupBarrier();
    return sum;
}
fn tokens_count_of_lanes(thread: u32, x: i32) -> i32 {
    room_of_choices[thread] = x;
    workgroupBarrier();
    var sum = 0;
    for (var s = 0u; s < TOKENS; s++) { sum += room_of_choices[s * LANES + lane]; }
    workgroupBarrier();
    return sum;
}

fn begin(thread: u32) {
    lane = thread % LANES;
    first = thread - lane;
}
fn look_for_greatest_by_lanes(thread: u32, t: u32) {
    row = t * p.experts;
    var most = -inf();
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (has(i)) {
            own[i] = logit(expert_of_lane(i));
            most = max_nan(most, own[i]);
        }
    }
    greatest = lanes_max(thread, most);
}
fn weigh_by_lanes(thread: u32) {
    var sum = 0.0f;
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (has(i)) {
            weights[i] = e_to(own[i] - greatest);
            sum += weights[i];
        }
    }
    total = lanes_sum(thread, sum);
}
fn look_at_by_lanes(thread: u32, t: u32) {
    look_for_greatest_by_lanes(thread, t);
    weigh_by_lanes(thread);
}
// No NaN, and the largest logit is finite.
fn all_finite() -> bool { return !is_nan(total); }
fn softmax(l: f32) -> f32 { return divide(e_to(l - greatest), total); }
// Of the lane's i-th expert.
fn own_softmax(i: u32) -> f32 { return divide(weights[i], total); }

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
fn lanes_sum_of_values(thread: u32) -> f32 {
    var sum = 0.0f;
    for (var i = 0u; i < OWN_EXPERTS; i++) { if (has(i)) { sum += own_value(own[i]); } }
    return lanes_sum(thread, sum);
}

// SparseMixer's choices so far: bit i is the lane's i-th expert. What is left of a logit is -inf for those.
var<private> taken: u32;

fn left_of(i: u32) -> f32 { return select(own[i], -inf(), (taken >> i & 1u) == 1u); }

// SparseMixer's softmax over the logits that are left: the best of them and the sum of the weights.
var<private> mixer_best: f32;
var<private> mixer_sum: f32;

fn mixer_weight(l: f32) -> f32 {
    let near = l > -inf() && mixer_best - l <= jitter() * max(mixer_best, abs(l));
    return select(0.0f, e_to(l - mixer_best), near);
}
fn mixer_share(l: f32) -> f32 { return select(0.0f, mixer_weight(l) / mixer_sum, mixer_sum > 0.0f); }
fn look_at_mixer_by_lanes(thread: u32) {
    var most = -inf();
    for (var i = 0u; i < OWN_EXPERTS; i++) { if (has(i)) { most = max_nan(most, left_of(i)); } }
    mixer_best = lanes_max(thread, most);
    var sum = 0.0f;
    for (var i = 0u; i < OWN_EXPERTS; i++) { if (has(i)) { sum += mixer_weight(left_of(i)); } }
    mixer_sum = lanes_sum(thread, sum);
}
