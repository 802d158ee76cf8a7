// The gradient of the router's logits. `counts`: the counted choices of each expert, in `chunks` parts.

var<private> counts_of: array<f32, OWN_EXPERTS>;
var<private> d_of: array<f32, OWN_EXPERTS>;

fn count_by_lanes(thread: u32) {
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        var count = 0;
        if (has(i)) {
            for (var chunk = thread / LANES; chunk < p.chunks; chunk += TOKENS) {
                count += get_counts(chunk * p.experts + expert_of_lane(i));
            }
        }
        counts_of[i] = f32(tokens_count_of_lanes(thread, count));
    }
}

fn token_by_lanes(thread: u32, t: u32, there: bool) {
    look_at_by_lanes(thread, t);
    let finite = all_finite();
    var sum = 0.0f;
    if (NORMALISED) { sum = lanes_sum_of_values(thread); }
    let flat = NORMALISED && sum < TINY;
    let n = f32(p.tokens);
    // d of the loss by p[e] is this times the count of e.
    let by_count = get_d_balance(0u) * f32(p.experts) / n / (n * f32(p.counted));
    var dot = 0.0f;
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (!has(i)) { continue; }
        var prob = own_softmax(i);
        if (NORMALISED) { prob = select(own_value(own[i]) / sum, 1.0f / f32(p.experts), flat); }
        dot += prob * (by_count * counts_of[i]);
    }
    dot = lanes_sum(thread, dot);
    let of_z = get_d_z(0u) * 2.0f / n * (greatest + ln(total));
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (!has(i)) { continue; }
        // p times the derivative of ln p, up to what all experts share.
        let soft = own_softmax(i);
        var weight = soft;
        if (NORMALISED) { weight = select(own_slope(own[i], own_value(own[i])) / sum, 0.0f, flat); }
        var d = weight * (by_count * counts_of[i] - dot) + of_z * soft;
        for (var j = 0u; j < p.chosen && SCORE != 4u; j++) {
            let x = get_index(t * p.chosen + j);
            if (x < 0 || x >= i32(p.experts)) { continue; }
            let g = get_d_gate(t * p.chosen + j);
            if (SCORE == 0u) {
                let of_x = softmax(logit(u32(x)));
                d += g * of_x * (select(0.0f, 1.0f, u32(x) == expert_of_lane(i)) - soft);
            } else if (u32(x) == expert_of_lane(i)) {
                d += g * own_slope(own[i], own_value(own[i]));
            }
        }
        d_of[i] = d;
    }
    if (SCORE == 4u) {
        taken = 0u;
        for (var j = 0u; j < p.chosen; j++) {
            look_at_mixer_by_lanes(thread);
            let x = get_index(t * p.chosen + j);
            let real = x >= 0 && x < i32(p.experts);
            let i = u32(max(x, 0)) / LANES;
            let owner = real && u32(max(x, 0)) % LANES == lane;
            // Only the lane whose expert it is knows whether it is left.
            var share = 0.0f;
            if (owner) { share = mixer_share(select(logit(u32(x)), -inf(), (taken >> i & 1u) == 1u)); }
            let of_x = lanes_sum(thread, share);
            let g = get_d_gate(t * p.chosen + j);
            for (var o = 0u; o < OWN_EXPERTS; o++) {
                if (real && has(o)) {
                    let one = select(0.0f, 1.0f, u32(x) == expert_of_lane(o));
                    d_of[o] += g * of_x * (one - mixer_share(left_of(o)));
                }
            }
            if (owner) { taken |= 1u << i; }
        }
    }
    if (!there) { return; }
    for (var i = 0u; i < OWN_EXPERTS; i++) { if (has(i)) { set_d(row + expert_of_lane(i), select(nan(), d_of[i], finite)); } }
}

fn kernel(group: u32, thread: u32) {
    begin(thread);
    count_by_lanes(thread);
    for (var round = 0u; round < p.rounds; round++) {
        let nth = (group * p.rounds + round) * TOKENS + thread / LANES;
        token_by_lanes(thread, min(nth, p.tokens - 1u), nth < p.tokens);
    }
}
