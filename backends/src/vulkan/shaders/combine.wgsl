// y[t] = of_rows sum_j gate[t,j] rows[slot] + of_side side[t]: a thread for each element.

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (i >= p.tokens * p.d) { return; }
    let t = i / p.d;
    var sum = 0.0f;
    for (var j = t * p.k; j < (t + 1u) * p.k; j++) {
        let s = get_choice_slot(j);
        if (s >= 0 && s < i32(p.slots)) {
            var g = 1.0f;
            if (HAS_GATE) { g = get_gate(j); }
            sum = fma(g, get_rows(u32(s) * p.d + i % p.d), sum);
        }
    }
    if (HAS_COEFFICIENT) { sum *= get_coefficient(2u * t); }
    if (HAS_SIDE) {
        var of_side = 1.0f;
        if (HAS_COEFFICIENT) { of_side = get_coefficient(2u * t + 1u); }
        sum += of_side * get_side(i);
    }
    leave(i, sum);
}
