// c [n, width] for the `width` classes from `class0` on: dloss (q - [class = label]) + dkd T (Q - P). `colder` is 1 / T.

var<private> of_teacher: bool;

fn left(row: u32, k: u32) -> f32 {
    if (row >= p.n) { return 0.0f; }
    if (of_teacher) {
        if (k < p.teacher_d) { return get_teacher_x(row * p.teacher_d + k); }
    } else if (k < p.d) {
        return get_x(row * p.d + k);
    }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (column >= p.width) { return 0.0f; }
    if (of_teacher) {
        if (k < p.teacher_d) { return get_teacher_w((p.class0 + column) * p.teacher_d + k); }
    } else if (k < p.d) {
        return get_w((p.class0 + column) * p.d + k);
    }
    return 0.0f;
}

fn kernel(group: vec3<u32>, thread: u32) {
    let row0 = group.y * TILE;
    let column0 = group.x * TILE;
    of_teacher = true;
    gemm_tile(thread, row0, column0, p.teacher_d);
    var of_p: array<f32, SUMS>;
    for (var i = 0u; i < SUMS; i++) { of_p[i] = sums[i]; }
    of_teacher = false;
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
                let v = sums[i * OWN + j];
                let q = e_to(v - get_lse(row));
                var soft = q;
                if (SOFT) { soft = e_to(v * p.colder - get_soft_lse(row)); }
                let own = select(0.0f, 1.0f, u32(label) == p.class0 + column);
                let of_teacher_p = e_to(of_p[i * OWN + j] * p.colder - get_teacher_lse(row));
                g = get_dloss(row) * (q - own) + get_dkd(row) * p.temperature * (soft - of_teacher_p);
            }
            set_c(row * p.width + column, g);
        }
    }
}
