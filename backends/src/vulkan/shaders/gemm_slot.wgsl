// The row of one slot times the weights of the expert whose segment it is in; 0 behind the last segment, and where there is no slot. Which
// expert that is, `find_expert(thread)` says; p.experts if there is none.

var<private> slot: u32;
var<private> expert: u32;

fn place_slot(group: vec3<u32>, thread: u32, nth: u32) {
    slot = nth;
    expert = find_expert(thread);
    row0 = 0u;
    column0 = group.x * TILE_COLUMNS;
    depth = select(0u, p.k, expert < p.experts);
}
fn left_at(row: u32, k: u32) -> u32 { return select(NOWHERE, slot * p.k + k, row == 0u && k < depth); }
fn right_at(k: u32, column: u32) -> u32 {
    return select(NOWHERE, expert * p.k * p.n + k * p.w_row + column * p.w_column, k < depth && column < p.n);
}
fn right_step() -> u32 { return p.w_row; }
fn bias_of_expert(column: u32) -> f32 {
    if (HAS_BIAS) { if (expert < p.experts) { return get_bias(expert * p.n + column); } }
    return 0.0f;
}
