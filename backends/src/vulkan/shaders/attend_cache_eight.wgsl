// Attention over caches whose heads are a multiple of eight wide: a workgroup for each new token and head. ACROSS lanes side by side have a
// key, eight columns each, and four keys at a time; they keep eight columns of the result. Every 32 lanes have a softmax of their own, and
// these are joined at the end. A token's own key and value are taken from where they come from: they need not be in the caches yet.

const GROUPS: u32 = HEAD / 8u;
const SUBGROUPS: u32 = THREADS / 32u;
// Keys side by side.
const KEYS: u32 = THREADS / ACROSS;
// Columns of what 32 lanes leave.
const COLUMNS: u32 = 8u * ACROSS;

var<workgroup> tops: array<f32, SUBGROUPS>;
var<workgroup> totals: array<f32, SUBGROUPS>;

fn dot_of(a: Eight, b: Eight) -> f32 {
    let four = fma(a.odd, b.odd, a.even * b.even);
    return (four.x + four.y) + (four.z + four.w);
}

// Scores of four keys, of which the lane has these parts.
fn scores_of(thread: u32, parts: vec4<f32>) -> vec4<f32> {
    // A lane behind the last column has none.
    var dots = select(vec4<f32>(), parts, vec4<bool>(thread % ACROSS < GROUPS));
    for (var mask = ACROSS / 2u; mask > 0u; mask >>= 1u) { dots += other_four(thread, dots, mask); }
    return p.scale * dots;
}

fn kernel(group: u32, thread: u32) {
    place(group);
    let newest = visible - 1u;
    let column = min(thread % ACROSS, GROUPS - 1u) * 8u;
    let nth = thread / ACROSS;
    // Everything is asked for before anything is waited for. That makes no difference between keys that are there and others, whose
    // weights become 0.
    let query = eight_qkv(of_query + column);
    let own_key = eight_qkv(of_fresh + column);
    let own_value = eight_qkv(of_fresh + width + column);
    var key = vec4<u32>(nth, nth + KEYS, nth + 2u * KEYS, nth + 3u * KEYS);
    var at = of_cache + column + min(key, vec4<u32>(p.room - 1u)) * width;
    var k0 = eight_k_cache(at.x);
    var k1 = eight_k_cache(at.y);
    var k2 = eight_k_cache(at.z);
    var k3 = eight_k_cache(at.w);
    var v0 = eight_v_cache(at.x);
    var v1 = eight_v_cache(at.y);
    var v2 = eight_v_cache(at.z);
    var v3 = eight_v_cache(at.w);
    var greatest = scores_of(thread, vec4<f32>(dot_of(query, own_key))).x;
    // 1, or not a number; the first lanes begin with it.
    var sum = select(0.0f, e_to(greatest - greatest), nth == 0u);
    var even = select(vec4<f32>(), sum * own_value.even, vec4<bool>(nth == 0u));
    var odd = select(vec4<f32>(), sum * own_value.odd, vec4<bool>(nth == 0u));
    for (var key0 = 0u; key0 < newest; key0 += 4u * KEYS) {
        if (key0 > 0u) {
            key += vec4<u32>(4u * KEYS);
            at = of_cache + column + min(key, vec4<u32>(p.room - 1u)) * width;
            k0 = eight_k_cache(at.x);
            k1 = eight_k_cache(at.y);
            k2 = eight_k_cache(at.z);
            k3 = eight_k_cache(at.w);
            v0 = eight_v_cache(at.x);
            v1 = eight_v_cache(at.y);
            v2 = eight_v_cache(at.z);
            v3 = eight_v_cache(at.w);
        }
        let there = key < vec4<u32>(newest);
        let parts = vec4<f32>(dot_of(query, k0), dot_of(query, k1), dot_of(query, k2), dot_of(query, k3));
        let scores = select(vec4<f32>(-inf()), scores_of(thread, parts), there);
        var top = max_nan(max_nan(scores.x, scores.y), max_nan(scores.z, scores.w));
        top = max_nan(greatest, top);
        for (var mask = ACROSS; mask < 32u; mask <<= 1u) { top = max_nan(top, other_one(thread, top, mask)); }
        let shrink = e_to(greatest - top);
        let weight = vec4<f32>(e_to(scores.x - top), e_to(scores.y - top), e_to(scores.z - top), e_to(scores.w - top));
        sum = sum * shrink + ((weight.x + weight.y) + (weight.z + weight.w));
        even *= shrink;
        odd *= shrink;
        // What is not there may be anything, also no number.
        even = select(even, fma(vec4<f32>(weight.x), v0.even, even), vec4<bool>(there.x));
        odd = select(odd, fma(vec4<f32>(weight.x), v0.odd, odd), vec4<bool>(there.x));
        even = select(even, fma(vec4<f32>(weight.y), v1.even, even), vec4<bool>(there.y));
        odd = select(odd, fma(vec4<f32>(weight.y), v1.odd, odd), vec4<bool>(there.y));
        even = select(even, fma(vec4<f32>(weight.z), v2.even, even), vec4<bool>(there.z));
        odd = select(odd, fma(vec4<f32>(weight.z), v2.odd, odd), vec4<bool>(there.z));
        even = select(even, fma(vec4<f32>(weight.w), v3.even, even), vec4<bool>(there.w));
        odd = select(odd, fma(vec4<f32>(weight.w), v3.odd, odd), vec4<bool>(there.w));
        greatest = top;
    }
    for (var mask = ACROSS; mask < 32u; mask <<= 1u) { sum += other_one(thread, sum, mask); }
    fold_into(thread, thread / 32u * COLUMNS, even, odd);
    if (thread % 32u == 0u) {
        tops[thread / 32u] = greatest;
        totals[thread / 32u] = sum;
    }
    keep(group, thread, newest, own_key, own_value);
    workgroupBarrier();
    if (thread < HEAD) {
        var most = tops[0];
        for (var i = 1u; i < SUBGROUPS; i++) { most = max_nan(most, tops[i]); }
        var mixed = 0.0f;
        var total = 0.0f;
        for (var i = 0u; i < SUBGROUPS; i++) {
            let weight = e_to(tops[i] - most);
            mixed = fma(weight, folded[i * COLUMNS + thread], mixed);
            total = fma(weight, totals[i], total);
        }
        set_y(group * HEAD + thread, mixed / total);
    }
}
