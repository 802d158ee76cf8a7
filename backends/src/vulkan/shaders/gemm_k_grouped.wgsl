// c[e] = a^T b over the segment of expert e; 0 where that is empty.

var<private> first: u32;
var<private> c_first: u32;

fn place(group: vec3<u32>, thread: u32) -> bool {
    first = u32(get_offsets(group.z));
    depth = u32(get_offsets(group.z + 1u)) - first;
    c_first = group.z * p.m * p.n;
    row0 = group.y * TILE_ROWS;
    column0 = group.x * TILE_COLUMNS;
    return true;
}
fn left_at(row: u32, k: u32) -> u32 { return select(NOWHERE, (first + k) * p.m + row, row < p.m && k < depth); }
fn right_at(k: u32, column: u32) -> u32 {
    return select(NOWHERE, (first + k) * p.n + column, k < depth && column < p.n);
}
fn left_step() -> u32 { return p.m; }
fn right_step() -> u32 { return p.n; }
fn out_at(row: u32, column: u32) -> u32 {
    return select(NOWHERE, c_first + row * p.n + column, row < p.m && column < p.n);
}
fn finished(at: u32, column: u32, sum: f32) -> f32 { return sum; }
