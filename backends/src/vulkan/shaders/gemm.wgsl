// c = a b + bias + add, for each product of a batch. With `sum` the f32 result goes there and c is left alone; `add` is f32 of the same
// shape, and may be `sum`. Strides are in elements; c is row-major.

var<private> a_first: u32;
var<private> b_first: u32;

fn left(row: u32, k: u32) -> f32 {
    if (row < p.m && k < p.k) { return get_a(a_first + row * p.a_row + k * p.a_column); }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (k < p.k && column < p.n) { return get_b(b_first + k * p.b_row + column * p.b_column); }
    return 0.0f;
}

fn kernel(group: vec3<u32>, thread: u32) {
    a_first = group.z * p.a_batch;
    b_first = p.b_at + group.z * p.b_batch;
    let row0 = group.y * TILE;
    let column0 = group.x * TILE;
    gemm_tile(thread, row0, column0, p.k);
    for (var i = 0u; i < OWN; i++) {
        for (var j = 0u; j < OWN; j++) {
            let row = row0 + row_of(thread, i);
            let column = column0 + column_of(thread, j);
            if (row < p.m && column < p.n) {
                let at = group.z * p.c_batch + row * p.n + column;
                var v = sums[i * OWN + j];
                if (HAS_BIAS) { v += get_bias(column); }
                if (HAS_ADD) { v += get_add(at); }
                if (HAS_SUM) { set_sum(at, v); } else { set_c(p.c_at + at, v); }
            }
        }
    }
}
