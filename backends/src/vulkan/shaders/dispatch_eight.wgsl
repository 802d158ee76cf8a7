// rows[s] = gate x[token]: a thread for each eight elements.

fn kernel(group: u32, thread: u32) {
    let i = (group * THREADS + thread) * 8u;
    if (i >= p.slots * p.d) { return; }
    let c = get_slot_choice(i / p.d);
    var v = Eight();
    if (c >= 0 && c < i32(p.choices)) {
        v = eight_x(u32(c) / p.k * p.d + i % p.d);
        if (HAS_GATE) {
            let g = vec4<f32>(get_gate(u32(c)));
            v = Eight(v.even * g, v.odd * g);
        }
    }
    set_eight_rows(i, v);
}
