// What reductions over an axis have in common. FUNCTION: 0 sum, 1 mean, 2 maximum.

fn start() -> f32 { return select(0.0f, -inf(), FUNCTION == 2u); }
fn join(a: f32, b: f32) -> f32 {
    if (FUNCTION == 2u) { return max_nan(a, b); }
    return a + b;
}
fn end(x: f32) -> f32 {
    if (FUNCTION == 1u) { return x / f32(p.n); }
    return x;
}
