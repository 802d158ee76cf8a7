// out[c] = rows[slot] . y[token]: a workgroup for each choice.

fn kernel(group: u32, thread: u32) {
    let s = get_choice_slot(group);
    var dot = 0.0f;
    if (s >= 0 && s < i32(p.slots)) {
        for (var i = thread; i < p.d; i += THREADS) {
            dot = fma(get_rows(u32(s) * p.d + i), get_y(group / p.k * p.d + i), dot);
        }
    }
    dot = block_sum(thread, dot);
    if (thread == 0u) { set_gates(group, dot); }
}
