// One step of AdamW in place: a thread for each element. Nothing changes where lr or the scale is not finite or the step is below 1.
// `rounded`, if there is one, is kept equal to param, rounded.

// 1 - e^x of x <= 0.
fn one_minus_e_to(x: f32) -> f32 {
    if (x < -0.5f) { return 1.0f - e_to(x); }
    var series = 1.0f;
    for (var i = 9u; i > 1u; i--) { series = 1.0f + x / f32(i) * series; }
    return -x * series;
}

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (i >= p.n) { return; }
    let lr = get_lr(0u);
    let step = get_steps(0u);
    let scale = get_scale(0u);
    if (!is_finite(lr) || !is_finite(scale) || !(step >= 1.0f)) { return; }
    let keep = 1.0f - lr * p.weight_decay;
    let rate = lr / one_minus_e_to(step * p.ln_beta1);
    let root = 1.0f / sqrt(one_minus_e_to(step * p.ln_beta2));
    let g = get_grad(i) * scale;
    let m = p.beta1 * get_m(i) + (1.0f - p.beta1) * g;
    let v = p.beta2 * get_v(i) + (1.0f - p.beta2) * (g * g);
    let param = keep * get_param(i) - rate * (m / (sqrt(v) * root + p.eps));
    set_m(i, m);
    set_v(i, v);
    set_param(i, param);
    if (HAS_ROUNDED) { set_rounded(i, param); }
}
