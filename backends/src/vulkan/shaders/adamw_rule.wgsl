// What the kernels of AdamW share: the scalars of a step, and the step of one element.

// 1 - e^x of x <= 0.
fn one_minus_e_to(x: f32) -> f32 {
    if (x < -0.5f) { return 1.0f - e_to(x); }
    var series = 1.0f;
    for (var i = 9u; i > 1u; i--) { series = 1.0f + divide(x, f32(i)) * series; }
    return -x * series;
}

var<private> keep: f32;
var<private> rate: f32;
var<private> root: f32;
var<private> clip: f32;
var<private> number: f32;

// Reads the scalars. False for a step that changes nothing: where lr or the scale is not finite or the step is below 1.
fn begin_step() -> bool {
    let lr = get_lr(0u);
    number = get_steps(0u);
    clip = get_scale(0u);
    keep = 1.0f - lr * p.weight_decay;
    rate = divide(lr, one_minus_e_to(number * p.ln_beta1));
    root = divide(1.0f, square_root(one_minus_e_to(number * p.ln_beta2)));
    return is_finite(lr) && is_finite(clip) && number >= 1.0f;
}

// The new moments of element i.
fn moments(i: u32, m: f32, v: f32) -> vec2<f32> {
    let g = get_grad(i) * clip;
    return vec2<f32>(p.beta1 * m + (1.0f - p.beta1) * g, p.beta2 * v + (1.0f - p.beta2) * (g * g));
}

// Moves the parameter by its new moments.
fn move_param(i: u32, moment: vec2<f32>) {
    let param = keep * get_param(i) - rate * divide(moment.x, square_root(moment.y) * root + p.eps);
    set_param(i, param);
    if (HAS_ROUNDED) { set_rounded(i, param); }
}
