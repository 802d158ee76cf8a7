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

fn end_of(e: u32) -> u32 { return select(p.slots, u32(get_offsets(min(e + 1u, p.experts))), e < p.experts); }

fn place(group: vec3<u32>, thread: u32) -> bool {
    for (var e = thread; e <= p.experts; e += THREADS) {
        tiles[e] = (end_of(e) - u32(get_offsets(e)) + TILE_ROWS - 1u) / TILE_ROWS;
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
    if (expert > p.experts) { return false; }
    first = u32(get_offsets(expert));
    rows = end_of(expert) - first;
    row0 = my_tile * TILE_ROWS;
    column0 = group.x * TILE_COLUMNS;
    depth = select(0u, p.k, expert < p.experts);
    return true;
}
fn left_at(row: u32, k: u32) -> u32 { return select(NOWHERE, (first + row) * p.k + k, row < rows && k < depth); }
fn right_at(k: u32, column: u32) -> u32 {
    return select(NOWHERE, expert * p.k * p.n + k * p.w_row + column * p.w_column, k < depth && column < p.n);
}
fn left_step() -> u32 { return 1u; }
fn right_step() -> u32 { return p.w_row; }
fn out_at(row: u32, column: u32) -> u32 {
    return select(NOWHERE, (first + row) * p.n + column, row < rows && column < p.n);
}
fn finished(at: u32, column: u32, sum: f32) -> f32 {
    var v = sum;
    if (HAS_BIAS) { if (expert < p.experts) { v += get_bias(expert * p.n + column); } }
    return v;
}
