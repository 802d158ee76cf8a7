// y[t] = of_rows sum_j gate[t,j] rows[slot] + of_side side[t]: a thread for each eight elements.

fn kernel(group: u32, thread: u32) {
    let i = (group * THREADS + thread) * 8u;
    if (i >= p.tokens * p.d) { return; }
    let t = i / p.d;
    var even = vec4<f32>();
    var odd = vec4<f32>();
    for (var j = t * p.k; j < (t + 1u) * p.k; j++) {
        let s = get_choice_slot(j);
        if (s >= 0 && s < i32(p.slots)) {
            var g = vec4<f32>(1.0f);
            if (HAS_GATE) { g = vec4<f32>(get_gate(j)); }
            let row = eight_rows(u32(s) * p.d + i % p.d);
            even = fma(g, row.even, even);
            odd = fma(g, row.odd, odd);
        }
    }
    if (HAS_COEFFICIENT) {
        let of_rows = vec4<f32>(get_coefficient(2u * t));
        even *= of_rows;
        odd *= of_rows;
    }
    if (HAS_SIDE) {
        var of_side = vec4<f32>(1.0f);
        if (HAS_COEFFICIENT) { of_side = vec4<f32>(get_coefficient(2u * t + 1u)); }
        let side = eight_side(i);
        even += of_side * side.even;
        odd += of_side * side.odd;
    }
    set_eight_y(i, Eight(even, odd));
}
