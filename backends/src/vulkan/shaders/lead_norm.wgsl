// The rows of a product of few rows are those of a norm: every workgroup makes them all, while its first part of the other matrix is on its
// way, and the first workgroup stores them where something else reads them.

const MADE: u32 = TILE_ROWS * WIDTH / 4u;

var<workgroup> made: array<vec4<f32>, MADE>;
var<private> stores: bool;

fn leave_normed(nth: u32, i: u32, v: Eight) {
    let kept = as_stored(v);
    made[(nth * WIDTH + i) / 4u] = kept.even;
    made[(nth * WIDTH + i) / 4u + 1u] = kept.odd;
    if (stores) { set_eight_y(nth * WIDTH + i, v); }
}
fn leave_statistics(nth: u32, mean: f32, rstd: f32) {
    if (stores) {
        set_mean(nth, mean);
        set_rstd(nth, rstd);
    }
}
fn prepare(group: vec3<u32>, thread: u32) {
    stores = group.x == 0u;
    for (var r = 0u; r < TILE_ROWS; r++) { normalise(r, thread); }
    workgroupBarrier();
}
fn left_eight(r: u32, k: u32) -> Eight {
    let at = (r * WIDTH + k) / 4u;
    return Eight(made[at], made[at + 1u]);
}
