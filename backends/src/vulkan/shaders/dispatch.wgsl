// rows[s] = gate x[token]: a thread for each element.

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (i >= p.slots * p.d) { return; }
    let c = get_slot_choice(i / p.d);
    var v = 0.0f;
    if (c >= 0 && c < i32(p.choices)) {
        v = get_x(u32(c) / p.k * p.d + i % p.d);
        if (HAS_GATE) { v *= get_gate(u32(c)); }
    }
    set_rows(i, v);
}
