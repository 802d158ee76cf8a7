// The row of a slot is that of its token, as a dispatch would bring it; 0 where the slot is nobody's.

var<private> token_of_slot: u32;
var<private> gate_of_slot: f32;

fn prepare(group: vec3<u32>, thread: u32) {
    token_of_slot = NOWHERE;
    if (expert == p.experts) { return; }
    let c = get_slot_choice(slot);
    if (c >= 0 && c < i32(p.choices)) {
        token_of_slot = u32(c) / p.choices_each;
        if (HAS_DISPATCH_GATE) { gate_of_slot = get_dispatch_gate(u32(c)); }
    }
}
fn left_eight(r: u32, k: u32) -> Eight {
    if (token_of_slot == NOWHERE) { return Eight(); }
    let v = eight_a(token_of_slot * p.k + k);
    if (HAS_DISPATCH_GATE) { return as_stored(Eight(v.even * vec4<f32>(gate_of_slot), v.odd * vec4<f32>(gate_of_slot))); }
    return v;
}
