// The choice of experts: a thread for each token. What the statistics need of it goes to `probabilities` [n, experts] and `of_tokens`
// [n, 2] (lse squared, entropy). GROUPS (0: none), KEEP and TOP2 describe groups of experts. LATER says that noise is for the choices
// after the first.

const GROUP_SCORES: u32 = max(GROUPS, 1u);

// Chosen, or in a group that is left out.
var<private> closed: array<u32, WORDS>;
var<private> finite: bool;

fn close(e: u32) { closed[e / 32u] |= 1u << (e % 32u); }
fn is_open(e: u32) -> bool { return (closed[e / 32u] >> (e % 32u) & 1u) == 0u; }

fn value_of(e: u32) -> f32 {
    if (!finite) { return nan(); }
    if (SCORE == 0u) { return softmax(logit(e)); }
    return own_value(logit(e));
}
// What the choice goes by: the score values, or logits + noise, plus the bias.
fn rank(e: u32, noisy: bool) -> f32 {
    var r = 0.0f;
    if (noisy) { r = logit(e) + get_noise(row + e); } else { r = value_of(e); }
    if (HAS_BIAS) { r += get_bias(e); }
    // -0 and 0 are equal, and a NaN comes last.
    return select(r + 0.0f, -inf(), is_nan(r));
}
// The lowest expert with the largest rank among those that are open.
fn best_open(noisy: bool) -> u32 {
    var best = -inf();
    var at = p.experts;
    for (var e = 0u; e < p.experts; e++) {
        if (is_open(e)) {
            let r = rank(e, noisy);
            if (at == p.experts || r > best) {
                best = r;
                at = e;
            }
        }
    }
    return at;
}
// Closes every expert outside of the best groups.
fn close_groups(noisy: bool) {
    if (GROUPS == 0u) { return; }
    let size = p.experts / GROUP_SCORES;
    var scores: array<f32, GROUP_SCORES>;
    for (var g = 0u; g < GROUPS; g++) {
        var first = -inf();
        var second = -inf();
        for (var e = g * size; e < (g + 1u) * size; e++) {
            let r = rank(e, noisy);
            second = max(second, min(first, r));
            first = max(first, r);
        }
        let score = select(first, first + second, TOP2);
        scores[g] = select(score + 0.0f, -inf(), is_nan(score));
    }
    for (var g = 0u; g < GROUPS; g++) {
        var better = 0u;
        for (var other = 0u; other < GROUPS; other++) {
            if (scores[other] > scores[g] || (scores[other] == scores[g] && other < g)) { better++; }
        }
        if (better >= KEEP) {
            for (var e = g * size; e < (g + 1u) * size; e++) { close(e); }
        }
    }
}

fn kernel(group: u32, thread: u32) {
    let t = group * THREADS + thread;
    if (t >= p.n) { return; }
    look_at(t);
    finite = all_finite();
    for (var i = 0u; i < WORDS; i++) {
        taken[i] = 0u;
        closed[i] = 0u;
    }
    let lse = greatest + ln(total);
    var sum = 0.0f;
    if (NORMALISED) { sum = sum_of_values(); }
    var entropy = 0.0f;
    for (var e = 0u; e < p.experts; e++) {
        var prob = softmax(logit(e));
        if (NORMALISED && finite) { prob = select(divide(own_value(logit(e)), sum), divide(1.0f, f32(p.experts)), sum < TINY); }
        set_probabilities(row + e, prob);
        if (!(prob == 0.0f)) {
            if (NORMALISED) {
                entropy -= prob * ln(at_least(prob, TINY));
            } else {
                entropy -= prob * (logit(e) - greatest - ln(total));
            }
        }
    }
    set_of_tokens(2u * t, lse * lse);
    set_of_tokens(2u * t + 1u, entropy);

    var used = true;
    if (HAS_USED) { used = get_used(t) != 0u; }
    let noisy = HAS_NOISE && !LATER;
    if (!HAS_GIVEN && used && finite) { close_groups(noisy); }
    for (var j = 0u; j < p.k; j++) {
        var x = -1;
        if (used) {
            if (HAS_GIVEN) {
                x = get_given(t * p.k + j);
                if (x < 0 || x >= i32(p.experts)) { x = -1; }
            } else if (!finite) {
                x = i32(j);
            } else {
                let best = best_open(noisy || (HAS_NOISE && LATER && j > 0u));
                close(best);
                x = i32(best);
            }
        }
        var gate = 0.0f;
        if (x >= 0) {
            if (SCORE == 4u && finite) {
                look_at_mixer();
                gate = mixer_share(left_of(u32(x)));
                take(u32(x));
            } else {
                gate = value_of(u32(x));
            }
        }
        set_gate(t * p.k + j, gate);
        set_index(t * p.k + j, x);
    }
}
