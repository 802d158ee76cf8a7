// c[e] = a^T b over the segment of expert e; 0 where that is empty.

var<private> first: u32;
var<private> rows: u32;

fn left(row: u32, k: u32) -> f32 {
    if (row < p.m && k < rows) { return get_a((first + k) * p.m + row); }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (k < rows && column < p.n) { return get_b((first + k) * p.n + column); }
    return 0.0f;
}

fn kernel(group: vec3<u32>, thread: u32) {
    first = u32(get_offsets(group.z));
    rows = u32(get_offsets(group.z + 1u)) - first;
    let row0 = group.y * TILE;
    let column0 = group.x * TILE;
    gemm_tile(thread, row0, column0, rows);
    for (var i = 0u; i < OWN; i++) {
        for (var j = 0u; j < OWN; j++) {
            let row = row0 + row_of(thread, i);
            let column = column0 + column_of(thread, j);
            if (row < p.m && column < p.n) { set_c((group.z * p.m + row) * p.n + column, sums[i * OWN + j]); }
        }
    }
}
