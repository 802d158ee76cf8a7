// The factors of the logits of a linear classifier: rows of x [n, d] and of w [classes, d].

fn left(row: u32, k: u32) -> f32 {
    if (row < p.n && k < p.d) { return get_x(row * p.d + k); }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (k < p.d && column < p.classes) { return get_w(column * p.d + k); }
    return 0.0f;
}
