// AdamW with moments in bf16, rounded stochastically, as ir/src/moments/mod.rs: a thread for each four neighbours, which share a block
// of random words. m and v are the bits.

// With the lower half of `random`.
fn rounded_bits(x: f32, random: u32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits + (random & 0xffffu), bits | 0x400000u, is_nan(x)) >> 16u;
}

fn kernel(group: u32, thread: u32) {
    let first = (group * THREADS + thread) * 4u;
    if (!begin_step() || first >= p.n) { return; }
    let words = philox(vec2<u32>(0x6d6f6d65u, 0x726f756eu), first / 4u, vec2<u32>(p.stream, u32(number)));
    for (var j = 0u; j < min(4u, p.n - first); j++) {
        let i = first + j;
        let moment = moments(i, bf16_to_float(get_m(i)), bf16_to_float(get_v(i)));
        set_m(i, rounded_bits(moment.x, words[j]));
        set_v(i, rounded_bits(moment.y, words[j] >> 16u));
        move_param(i, moment);
    }
}
