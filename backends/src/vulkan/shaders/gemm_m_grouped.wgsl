// Rows of an expert's segment times its weights. A workgroup finds its tile by counting those of the experts before it: segments are
// cut into tiles one by one, so that no tile crosses the border of a segment. Behind the last expert the unused slots form a segment
// of their own, which becomes 0.

const MOST_TILES: u32 = MOST_EXPERTS + 1u;

var<workgroup> tiles: array<u32, MOST_TILES>;
var<workgroup> my_expert: u32;
var<workgroup> my_tile: u32;
var<private> first: u32;
var<private> rows: u32;
var<private> expert: u32;

fn left(row: u32, k: u32) -> f32 {
    if (row < rows && k < p.k) { return get_a((first + row) * p.k + k); }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (k < p.k && column < p.n) { return get_w(expert * p.k * p.n + k * p.w_row + column * p.w_column); }
    return 0.0f;
}
fn end_of(e: u32) -> u32 { return select(p.slots, u32(get_offsets(min(e + 1u, p.experts))), e < p.experts); }

fn kernel(group: vec3<u32>, thread: u32) {
    for (var e = thread; e <= p.experts; e += THREADS) {
        tiles[e] = (end_of(e) - u32(get_offsets(e)) + TILE - 1u) / TILE;
    }
    if (thread == 0u) { my_expert = MOST_TILES; }
    workgroupBarrier();
    for (var e = thread; e <= p.experts; e += THREADS) {
        var before = 0u;
        for (var i = 0u; i < e; i++) { before += tiles[i]; }
        if (group.y >= before && group.y - before < tiles[e]) {
            my_expert = e;
            my_tile = group.y - before;
        }
    }
    workgroupBarrier();
    expert = my_expert;
    if (expert > p.experts) { return; }
    first = u32(get_offsets(expert));
    rows = end_of(expert) - first;
    let row0 = my_tile * TILE;
    let column0 = group.x * TILE;
    let used = expert < p.experts;
    if (used) { gemm_tile(thread, row0, column0, p.k); }
    for (var i = 0u; i < OWN; i++) {
        for (var j = 0u; j < OWN; j++) {
            let row = row0 + row_of(thread, i);
            let column = column0 + column_of(thread, j);
            if (row < rows && column < p.n) {
                var v = 0.0f;
                if (used) {
                    v = sums[i * OWN + j];
                    if (HAS_BIAS) { v += get_bias(expert * p.n + column); }
                }
                set_c((first + row) * p.n + column, v);
            }
        }
    }
}
