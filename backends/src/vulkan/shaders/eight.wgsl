// Eight neighbours in memory, as f32: those at even places and those at odd ones, which is how pairs of 16-bit floats come apart.
struct Eight {
    even: vec4<f32>,
    odd: vec4<f32>,
}

// Eight of 32 bits as they are loaded.
struct RawF32 {
    low: vec4<u32>,
    high: vec4<u32>,
}

fn eight_of_bf16(pairs: vec4<u32>) -> Eight {
    return Eight(bitcast<vec4<f32>>(pairs << vec4<u32>(16u)), bitcast<vec4<f32>>(pairs & vec4<u32>(0xffff0000u)));
}
fn eight_of_f16(pairs: vec4<u32>) -> Eight {
    return Eight(
        vec4<f32>(f16_to_float(pairs.x & 0xffffu), f16_to_float(pairs.y & 0xffffu), f16_to_float(pairs.z & 0xffffu),
            f16_to_float(pairs.w & 0xffffu)),
        vec4<f32>(f16_to_float(pairs.x >> 16u), f16_to_float(pairs.y >> 16u), f16_to_float(pairs.z >> 16u),
            f16_to_float(pairs.w >> 16u)));
}
fn eight_of_f32(low: vec4<u32>, high: vec4<u32>) -> Eight {
    let a = bitcast<vec4<f32>>(low);
    let b = bitcast<vec4<f32>>(high);
    return Eight(vec4<f32>(a.x, a.z, b.x, b.z), vec4<f32>(a.y, a.w, b.y, b.w));
}
fn bf16_of_eight(v: Eight) -> vec4<u32> {
    return vec4<u32>(bf16_bits(v.even.x) | bf16_bits(v.odd.x) << 16u, bf16_bits(v.even.y) | bf16_bits(v.odd.y) << 16u,
        bf16_bits(v.even.z) | bf16_bits(v.odd.z) << 16u, bf16_bits(v.even.w) | bf16_bits(v.odd.w) << 16u);
}
fn f16_of_eight(v: Eight) -> vec4<u32> {
    return vec4<u32>(f16_bits(v.even.x) | f16_bits(v.odd.x) << 16u, f16_bits(v.even.y) | f16_bits(v.odd.y) << 16u,
        f16_bits(v.even.z) | f16_bits(v.odd.z) << 16u, f16_bits(v.even.w) | f16_bits(v.odd.w) << 16u);
}
// The first four of them, and the others.
fn low_of_eight(v: Eight) -> vec4<u32> {
    return bitcast<vec4<u32>>(vec4<f32>(v.even.x, v.odd.x, v.even.y, v.odd.y));
}
fn high_of_eight(v: Eight) -> vec4<u32> {
    return bitcast<vec4<u32>>(vec4<f32>(v.even.z, v.odd.z, v.even.w, v.odd.w));
}
// The sum of all eight.
fn sum_of(v: Eight) -> f32 {
    let four = v.even + v.odd;
    return (four.x + four.y) + (four.z + four.w);
}
