// The gradient of the router's logits: a thread for each token.

fn kernel(group: u32, thread: u32) {
    let t = group * THREADS + thread;
    if (t >= p.n) { return; }
    look_at(t);
    if (!all_finite()) {
        for (var e = 0u; e < p.experts; e++) { set_d(row + e, nan()); }
        return;
    }
    var sum = 0.0f;
    if (NORMALISED) { sum = sum_of_values(); }
    let flat = NORMALISED && sum < TINY;
    let n = f32(p.n);
    // d of the loss by p[e] is this times the count of e.
    let by_count = get_d_balance(0u) * f32(p.experts) / n / (n * f32(p.counted));
    var dot = 0.0f;
    for (var e = 0u; e < p.experts; e++) {
        var prob = softmax(logit(e));
        if (NORMALISED) { prob = select(own_value(logit(e)) / sum, 1.0f / f32(p.experts), flat); }
        dot += prob * (by_count * f32(get_counts(e)));
    }
    let of_z = get_d_z(0u) * 2.0f / n * (greatest + ln(total));
    for (var e = 0u; e < p.experts; e++) {
        // p times the derivative of ln p, up to what all experts share.
        var weight = softmax(logit(e));
        if (NORMALISED) { weight = select(own_slope(logit(e), own_value(logit(e))) / sum, 0.0f, flat); }
        var d = weight * (by_count * f32(get_counts(e)) - dot) + of_z * softmax(logit(e));
        for (var j = 0u; j < p.k && SCORE != 4u; j++) {
            let x = get_index(t * p.k + j);
            if (x < 0 || x >= i32(p.experts)) { continue; }
            let g = get_d_gate(t * p.k + j);
            if (SCORE == 0u) {
                let of_x = softmax(logit(u32(x)));
                d += g * of_x * (select(0.0f, 1.0f, u32(x) == e) - softmax(logit(e)));
            } else if (u32(x) == e) {
                d += g * own_slope(logit(e), own_value(logit(e)));
            }
        }
        set_d(row + e, d);
    }
    if (SCORE == 4u) {
        for (var i = 0u; i < WORDS; i++) { taken[i] = 0u; }
        for (var j = 0u; j < p.k; j++) {
            let x = get_index(t * p.k + j);
            if (x < 0 || x >= i32(p.experts)) { continue; }
            look_at_mixer();
            let g = get_d_gate(t * p.k + j);
            let of_x = mixer_share(left_of(u32(x)));
            for (var e = 0u; e < p.experts; e++) {
                let own = select(0.0f, 1.0f, u32(x) == e);
                set_d(row + e, get_d(row + e) + g * of_x * (own - mixer_share(left_of(e))));
            }
            take(u32(x));
        }
    }
}
