// c [n, width] = dloss (softmax - [class = label]) for the `width` classes from `class0` on.

fn left(row: u32, k: u32) -> f32 {
    if (row < p.n && k < p.d) { return get_x(row * p.d + k); }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (k < p.d && column < p.width) { return get_w((p.class0 + column) * p.d + k); }
    return 0.0f;
}

fn kernel(group: vec3<u32>, thread: u32) {
    let row0 = group.y * TILE;
    let column0 = group.x * TILE;
    gemm_tile(thread, row0, column0, p.d);
    for (var i = 0u; i < OWN; i++) {
        let row = row0 + row_of(thread, i);
        if (row >= p.n) { continue; }
        let label = get_labels(row);
        for (var j = 0u; j < OWN; j++) {
            let column = column0 + column_of(thread, j);
            if (column >= p.width) { continue; }
            var g = 0.0f;
            if (label >= i32(p.classes)) {
                reject(label);
                g = nan();
            } else if (label >= 0) {
                let own = select(0.0f, 1.0f, u32(label) == p.class0 + column);
                g = get_dloss(row) * (e_to(sums[i * OWN + j] - get_lse(row)) - own);
            }
            set_c(row * p.width + column, g);
        }
    }
}
