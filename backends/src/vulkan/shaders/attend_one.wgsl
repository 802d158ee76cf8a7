// Attention of one new token of each sequence over caches whose heads are a multiple of eight wide. Its key and value are taken from where
// they come from, and nothing waits until they are in the caches: the first of the heads that share them puts them there. A thread has a
// key's score, then eight columns of the result over every SLICES-th key.

const GROUPS: u32 = HEAD / 8u;
const SLICES: u32 = THREADS / GROUPS;
// Keys of a slice among THREADS.
const TURNS: u32 = (THREADS + SLICES - 1u) / SLICES;
const MIXED: u32 = 2u * THREADS;

var<workgroup> query: array<Eight, GROUPS>;
var<workgroup> mixed: array<vec4<f32>, MIXED>;

fn kernel(group: u32, thread: u32) {
    place(group);
    let newest = visible - 1u;
    let shared_by = p.heads / p.kv_heads;
    let head = group % p.heads;
    // The new key and, so much behind it, the new value.
    let fresh = (group / p.heads * (p.heads + 2u * p.kv_heads) + p.heads + head / shared_by) * HEAD;
    if (group == 0u && thread == 0u && i32(newest) != get_start(0u)) { reject(get_start(0u)); }
    if (head % shared_by == 0u && thread < GROUPS) {
        let to = of_cache + newest * width + thread * 8u;
        set_eight_k_cache(to, eight_qkv(fresh + thread * 8u));
        set_eight_v_cache(to, eight_qkv(fresh + width + thread * 8u));
    }
    if (thread < GROUPS) { query[thread] = eight_qkv(of_query + thread * 8u); }
    workgroupBarrier();
    let column = thread % GROUPS * 8u;
    let slice = thread / GROUPS;
    var dot = vec4<f32>();
    for (var c = 0u; c < GROUPS; c++) {
        let k = eight_qkv(fresh + c * 8u);
        dot = fma(query[c].even, k.even, dot);
        dot = fma(query[c].odd, k.odd, dot);
    }
    greatest = p.scale * ((dot.x + dot.y) + (dot.z + dot.w));
    // 1, or not a number.
    sum = e_to(greatest - greatest);
    var even = vec4<f32>();
    var odd = vec4<f32>();
    if (slice == 0u) {
        let v = eight_qkv(fresh + width + column);
        even = sum * v.even;
        odd = sum * v.odd;
    }
    for (var key0 = 0u; key0 < newest; key0 += THREADS) {
        let key = min(key0 + thread, newest - 1u);
        dot = vec4<f32>();
        for (var c = 0u; c < GROUPS; c++) {
            let k = eight_k_cache(of_cache + key * width + c * 8u);
            dot = fma(query[c].even, k.even, dot);
            dot = fma(query[c].odd, k.odd, dot);
        }
        let score = p.scale * ((dot.x + dot.y) + (dot.z + dot.w));
        let shrink = weigh(thread, select(-inf(), score, key0 + thread < newest));
        even *= vec4<f32>(shrink);
        odd *= vec4<f32>(shrink);
        let count = min(THREADS, newest - key0);
        for (var turn = 0u; turn < TURNS; turn++) {
            // Behind the last key it is read again, for nothing: so no load waits for the one before.
            let j = turn * SLICES + slice;
            let real = slice < SLICES && j < count;
            let v = eight_v_cache(of_cache + (key0 + min(j, count - 1u)) * width + column);
            let weight = weights[min(j, count - 1u)];
            even = select(even, fma(vec4<f32>(weight), v.even, even), vec4<bool>(real));
            odd = select(odd, fma(vec4<f32>(weight), v.odd, odd), vec4<bool>(real));
        }
        workgroupBarrier();
    }
    mixed[2u * thread] = even;
    mixed[2u * thread + 1u] = odd;
    workgroupBarrier();
    if (thread < HEAD) {
        var all = 0.0f;
        for (var s = 0u; s < SLICES; s++) {
            all += mixed[2u * (s * GROUPS + thread / 8u) + thread % 2u][thread % 8u / 2u];
        }
        set_y(group * HEAD + thread, all / sum);
    }
}
