// The choice of experts, and what the statistics need of a workgroup's tokens; if it has ALL of them, the statistics. `parts` has two
// numbers of each of `parts_count` workgroups, then one of each expert; `choices` two of each expert. GROUPS (0: none), KEEP and TOP2 describe groups of
// experts. LATER says that noise is for the choices after the first.

const GROUP_SCORES: u32 = max(GROUPS, 1u);
const ALL_SCORES: u32 = TOKENS * GROUP_SCORES;

var<workgroup> scores: array<f32, ALL_SCORES>;

// Chosen, or in a group that is left out: bit i is the lane's i-th expert. What the choice goes by for those.
var<private> closed: u32;
var<private> ranks: array<f32, OWN_EXPERTS>;
var<private> finite: bool;
// The last choice of the token.
var<private> choice: i32;

fn value_of(l: f32) -> f32 {
    if (!finite) { return nan(); }
    if (SCORE == 0u) { return softmax(l); }
    return own_value(l);
}
fn own_value_of(i: u32) -> f32 {
    if (SCORE == 0u && finite) { return own_softmax(i); }
    return value_of(own[i]);
}
// What the choice goes by: the score values, or logits + noise, plus the bias.
fn rank(e: u32, l: f32, value: f32, noisy: bool) -> f32 {
    var r = value;
    if (noisy) { r = l + get_noise(row + e); }
    if (HAS_SELECTION_BIAS) { r += get_selection_bias(e); }
    // -0 and 0 are equal, and a NaN comes last.
    return select(r + 0.0f, -inf(), is_nan(r));
}
// The lowest expert with the largest rank among those that are open.
fn best_open_of_lanes(thread: u32) -> u32 {
    var best = -inf();
    var at = p.experts;
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (has(i) && (closed >> i & 1u) == 0u && (at == p.experts || ranks[i] > best)) {
            best = ranks[i];
            at = expert_of_lane(i);
        }
    }
    return best_of_lanes(thread, best, at);
}
// Closes every expert outside of the best groups.
fn close_groups_by_lanes(noisy: bool) {
    let size = p.experts / GROUP_SCORES;
    let of_token = first / LANES * GROUP_SCORES;
    for (var g = lane; g < GROUPS; g += LANES) {
        var most = -inf();
        var second = -inf();
        for (var e = g * size; e < (g + 1u) * size; e++) {
            let r = rank(e, logit(e), value_of(logit(e)), noisy);
            second = max(second, min(most, r));
            most = max(most, r);
        }
        let score = select(most, most + second, TOP2);
        scores[of_token + g] = select(score + 0.0f, -inf(), is_nan(score));
    }
    workgroupBarrier();
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (!has(i)) { continue; }
        let g = expert_of_lane(i) / size;
        let score = scores[of_token + g];
        var better = 0u;
        for (var other = 0u; other < GROUPS; other++) {
            if (scores[of_token + other] > score || (scores[of_token + other] == score && other < g)) { better++; }
        }
        if (better >= KEEP) { closed |= 1u << i; }
    }
}

fn probabilities_by_lanes(thread: u32, there: bool) {
    var sum = 0.0f;
    if (NORMALISED) { sum = lanes_sum_of_values(thread); }
    let log_total = ln(total);
    var entropy = 0.0f;
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (!has(i)) { continue; }
        var prob = own_softmax(i);
        if (NORMALISED && finite) { prob = select(divide(own_value(own[i]), sum), divide(1.0f, f32(p.experts)), sum < TINY); }
        if (there) { of_experts[i] += prob; }
        if (!(prob == 0.0f)) {
            if (NORMALISED) {
                entropy -= prob * ln(at_least(prob, TINY));
            } else {
                entropy -= prob * (own[i] - greatest - log_total);
            }
        }
    }
    entropy = lanes_sum(thread, entropy);
    if (there && lane == 0u) {
        let lse = greatest + log_total;
        of_z += lse * lse;
        of_entropy += entropy;
    }
}

// The j-th choice of a token, of an expert of the lane.
fn note(at: u32, j: u32, x: i32, there: bool) {
    var gate = 0.0f;
    if (x >= 0) {
        let i = u32(x) / LANES;
        closed |= 1u << i;
        for (var o = 0u; o < OWN_EXPERTS; o++) {
            if (there && o == i) {
                if (SCORE == 4u && finite) { gate = mixer_share(left_of(o)); } else { gate = own_value_of(o); }
                all_of[o]++;
                if (j < p.counted) { counted_of[o]++; }
            }
        }
        if (SCORE == 4u && finite) { taken |= 1u << i; }
    }
    if (there) {
        set_gate(at, gate);
        set_index(at, x);
    }
}

fn choose_by_lanes(thread: u32, t: u32, there: bool) {
    taken = 0u;
    closed = 0u;
    var used = true;
    if (HAS_USED) { used = get_used(t) != 0u; }
    let noisy = HAS_NOISE && !LATER;
    if (GROUPS > 0u && !HAS_GIVEN) { close_groups_by_lanes(noisy); }
    for (var j = 0u; j < p.chosen; j++) {
        var best = 0u;
        if (!HAS_GIVEN) {
            if (j == 0u || (j == 1u && HAS_NOISE && LATER)) {
                for (var i = 0u; i < OWN_EXPERTS; i++) {
                    let with_noise = noisy || (HAS_NOISE && LATER && j > 0u);
                    if (has(i)) { ranks[i] = rank(expert_of_lane(i), own[i], own_value_of(i), with_noise); }
                }
            }
            best = best_open_of_lanes(thread);
        }
        var x = -1;
        if (used) {
            if (HAS_GIVEN) {
                x = get_given(t * p.chosen + j);
                if (x < 0 || x >= i32(p.experts)) { x = -1; }
            } else if (finite) {
                x = i32(best);
            } else {
                x = i32(j);
            }
        }
        choice = x;
        if (SCORE == 4u) { look_at_mixer_by_lanes(thread); }
        // The lane whose expert it is notes the choice; the first one, that there is none.
        if (u32(max(x, 0)) % LANES == lane) { note(t * p.chosen + j, j, x, there); }
    }
}

// The workgroup's part of the statistics.
fn leave_parts(group: u32, thread: u32) {
    if (thread >= LANES) { return; }
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (has(i)) {
            let at = group * p.experts + expert_of_lane(i);
            set_parts(2u * p.parts_count + at, of_experts[i]);
            set_choices(2u * at, all_of[i]);
            set_choices(2u * at + 1u, counted_of[i]);
        }
    }
    if (thread == 0u) {
        set_parts(2u * group, of_z);
        set_parts(2u * group + 1u, of_entropy);
    }
}

fn route_tokens(group: u32, thread: u32) {
    begin(thread);
    for (var round = 0u; round < p.rounds; round++) {
        // Threads without a token work on the last one, for nothing.
        let nth = (group * p.rounds + round) * TOKENS + thread / LANES;
        let t = min(nth, p.tokens - 1u);
        look_at_by_lanes(thread, t);
        finite = all_finite();
        probabilities_by_lanes(thread, nth < p.tokens);
        choose_by_lanes(thread, t, nth < p.tokens);
    }
    together_by_lanes(thread);
    if (ALL) { end_by_lanes(thread); } else { leave_parts(group, thread); }
}
