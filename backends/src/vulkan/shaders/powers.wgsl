// The power of 2 below a positive number; 1 for 0, the tiniest numbers and what is not a number.

fn power_below(x: f32) -> f32 {
    let power = bitcast<f32>(bitcast<u32>(x) & 0x7f800000u);
    return select(1.0f, power, power > 0.0f && is_finite(x));
}
