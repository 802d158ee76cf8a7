// AdamW with moments in 8 bits, rounded stochastically: ir/src/moments/eight.rs has the formulas. A workgroup has a block of THREADS
// elements, a thread one of them.

// The square of the highest code of the first moment.
const MOST_M: f32 = 16129.0f;
// Adding and subtracting it rounds a small number to a whole one.
const WHOLE: f32 = 8388608.0f;
// What the levels of the second moment are fourth powers of multiples of.
const STEP: f32 = 0.00390625f;
// Adding and subtracting it rounds a number of at most 1 to a multiple of STEP.
const STEPS: f32 = 32768.0f;
const LARGEST: f32 = 3.40282347e38f;

var<workgroup> most: array<u32, THREADS>;
var<workgroup> codes: array<vec2<u32>, THREADS>;

// The largest over all threads.
fn block_most(thread: u32, x: u32) -> u32 {
    most[thread] = x;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half >>= 1u) {
        if (thread < half) { most[thread] = max(most[thread], most[thread + half]); }
        workgroupBarrier();
    }
    let found = most[0];
    workgroupBarrier();
    return found;
}

fn m_of(code: u32, factor: f32) -> f32 {
    let j = f32(bitcast<i32>(code << 24u) >> 24u);
    return j * abs(j) * factor;
}
fn level(t: f32) -> f32 {
    let square = t * t;
    return square * square;
}
fn v_of(code: u32, factor: f32) -> f32 { return level((f32(code) + 1.0f) * STEP) * factor; }

// The scale of a block whose largest number, over `parts`, has these bits.
fn scale_of(largest: u32, parts: f32) -> f32 {
    let x = divide(min(bitcast<f32>(min(largest, bitcast<u32>(LARGEST))), LARGEST), parts);
    return select(0.0f, x, x >= 1.17549435e-38f);
}
fn inverse_of(factor: f32) -> f32 {
    if (factor > 0.0f) { return divide(1.0f, factor); }
    return 0.0f;
}
// The middle of a part of 0..1, by bits 7 to 22.
fn part_of(random: u32) -> f32 {
    return bitcast<f32>(0x3f800000u | (random & 0x7fff80u)) - (1.0f - 1.0f / 131072.0f);
}
// The least of a number and a bound; of what is not a number the bound.
fn bounded(x: f32, bound: f32) -> f32 { return select(bound, x, x < bound); }

fn code_of_m(m: f32, inverse: f32, random: u32) -> u32 {
    let x = bounded(abs(m) * inverse, MOST_M);
    // The highest j whose level is not above x: the nearest to the root, or the one below.
    let near = (sqrt(x) + WHOLE) - WHOLE;
    let j = select(near, near - 1.0f, x - near * near < 0.0f);
    let size = select(j, j + 1.0f, x - j * j > part_of(random) * (j + j + 1.0f));
    let signed = select(size, -size, bitcast<i32>(m) < 0);
    return (bitcast<u32>(signed + (WHOLE + 128.0f)) & 0xffu) ^ 0x80u;
}
fn code_of_v(v: f32, inverse: f32, random: u32) -> u32 {
    let x = bounded(v * inverse, 1.0f);
    // The level nearest to the root, and its neighbour on the other side of x.
    let near = (sqrt(sqrt(x)) + STEPS) - STEPS;
    let here = level(near);
    let other = near + select(STEP, -STEP, here > x);
    let beside = level(other);
    let below = min(here, beside);
    let above = max(here, beside);
    let up = x - below > part_of(random) * (above - below);
    let t = max(min(near, other) + select(0.0f, STEP, up), STEP);
    return bitcast<u32>(t + (STEPS - STEP)) & 0xffu;
}

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (!begin_step()) { return; }
    let shift = 8u * (i & 3u);
    var moment = vec2<f32>(0.0f, 0.0f);
    if (i < p.n) {
        let m = m_of(get_m(i / 4u) >> shift & 0xffu, get_scales(2u * group));
        moment = moments(i, m, v_of(get_v(i / 4u) >> shift & 0xffu, get_scales(2u * group + 1u)));
        move_param(i, moment);
    }
    // The bits of numbers that are not negative rise with them.
    let m_scale = scale_of(block_most(thread, bitcast<u32>(moment.x) & 0x7fffffffu), MOST_M);
    let v_scale = scale_of(block_most(thread, bitcast<u32>(moment.y) & 0x7fffffffu), 1.0f);
    let words = philox(vec2<u32>(0x6d6f6d65u, 0x726f756eu), i / 4u, vec2<u32>(p.stream, u32(number)));
    let word = words[i & 3u];
    codes[thread] = vec2<u32>(
        code_of_m(moment.x, inverse_of(m_scale), word),
        code_of_v(moment.y, inverse_of(v_scale), (word << 16u) | (word >> 16u)),
    );
    workgroupBarrier();
    if (thread == 0u) {
        set_scales(2u * group, m_scale);
        set_scales(2u * group + 1u, v_scale);
    }
    if ((thread & 3u) == 0u && i < p.n) {
        let packed = codes[thread] | (codes[thread + 1u] << vec2<u32>(8u)) | (codes[thread + 2u] << vec2<u32>(16u))
            | (codes[thread + 3u] << vec2<u32>(24u));
        set_m(i / 4u, packed.x);
        set_v(i / 4u, packed.y);
    }
}
