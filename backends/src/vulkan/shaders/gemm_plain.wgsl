// The tile of a workgroup with every product by itself.

fn left(row: u32, k: u32) -> f32 {
    let at = left_at(row, k);
    if (at != NOWHERE) { return get_a(at); }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    let at = right_at(k, column);
    if (at != NOWHERE) { return get_b(at); }
    return 0.0f;
}

fn kernel(group: vec3<u32>, thread: u32) {
    if (!place(group, thread)) { return; }
    gemm_tile(thread, row0, column0, depth);
    for (var i = 0u; i < OWN; i++) {
        for (var j = 0u; j < OWN_WIDTH; j++) {
            put(row0 + row_of(thread, i), column0 + column_of(thread, j), sums[i * OWN_WIDTH + j]);
        }
    }
}
