// Random numbers, as ir/src/philox.rs: the same bits as on the CPU. A thread makes one block of four numbers; NUMBERS stands for the
// statements that make two of them, `even` and `odd`, of the words `a` and `b`.

const UNIT: f32 = 5.9604644775390625e-8f;

fn unit(word: u32) -> f32 { return f32(word >> 8u) * UNIT; }

// The natural logarithm of a positive normal number, step by step as philox.rs has it.
fn ln_of(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let e = bitcast<i32>(bits - 0x3f3504f3u) >> 23u;
    let m = bitcast<f32>(bits - (bitcast<u32>(e) << 23u)) - 1.0f;
    let fe = f32(e);
    let z = m * m;
    let y = ln_polynomial(m) * m * z + fe * -2.1219444e-4f - 0.5f * z;
    return (m + y) + fe * 0.6933594f;
}

// (cos, sin) of u turns, 0 <= u < 1.
fn turns(u: f32) -> vec2<f32> {
    let quarter = i32(u * 4.0f + 0.5f);
    let x = (u - f32(quarter) * 0.25f) * 6.2831853071795864769f;
    let z = x * x;
    let sine = ((-1.9515296e-4f * z + 8.3321609e-3f) * z - 1.6666655e-1f) * z * x + x;
    let cosine = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - 0.5f * z + 1.0f;
    let odd = (quarter & 1) == 1;
    let a = select(cosine, sine, odd);
    let b = select(sine, cosine, odd);
    return vec2<f32>(select(a, -a, ((quarter + 1) & 2) == 2), select(b, -b, (quarter & 2) == 2));
}

// The exact difference a b - c of a product that is close to c.
fn residue(a: f32, b: f32, c: f32) -> f32 {
    let a_high = bitcast<f32>(bitcast<u32>(a) & 0xfffff000u);
    let b_high = bitcast<f32>(bitcast<u32>(b) & 0xfffff000u);
    let a_low = a - a_high;
    let b_low = b - b_high;
    return ((a_high * b_high - c) + a_high * b_low + a_low * b_high) + a_low * b_low;
}

// The root of a number that is 0 or between 1e-8 and 100, rounded to nearest: a device's own root may be off by a few units.
fn root(x: f32) -> f32 {
    if (x == 0.0f) { return 0.0f; }
    var s = sqrt(x);
    for (var i = 0u; i < 3u; i++) {
        let up = bitcast<f32>(bitcast<u32>(s) + 1u);
        let down = bitcast<f32>(bitcast<u32>(s) - 1u);
        // x against the middles to both sides: (s + u/2)^2 = s up + u^2/4, up to less than what can occur between f32 numbers.
        if (residue(s, up, x) < 0.0f) { s = up; } else if (residue(s, down, x) >= 0.0f) { s = down; }
    }
    return s;
}

fn gumbel(word: u32) -> f32 { return -ln_of(-ln_of(f32((word >> 8u) | 1u) * UNIT)); }

fn kernel(group: u32, thread: u32) {
    let block = group * THREADS + thread;
    if (block * 4u >= p.elements) { return; }
    let words = philox(vec2<u32>(get_key(0u), get_key(1u)), block, vec2<u32>(p.stream, 0u));
    for (var pair = 0u; pair < 4u; pair += 2u) {
        let a = words[pair];
        let b = words[pair + 1u];
        let i = block * 4u + pair;
        NUMBERS
        if (i < p.elements) { set_out(i, even); }
        if (i + 1u < p.elements) { set_out(i + 1u, odd); }
    }
}
