// Attention over caches whose heads are a multiple of eight wide: a thread has a key's score, then eight columns of the result over every
// SLICES-th key.

const GROUPS: u32 = HEAD / 8u;
const SLICES: u32 = THREADS / GROUPS;
const MIXED: u32 = 2u * THREADS;

var<workgroup> query: array<Eight, GROUPS>;
var<workgroup> mixed: array<vec4<f32>, MIXED>;

fn kernel(group: u32, thread: u32) {
    place(group);
    if (thread < GROUPS) { query[thread] = eight_qkv(of_query + thread * 8u); }
    workgroupBarrier();
    let column = thread % GROUPS * 8u;
    let slice = thread / GROUPS;
    var even = vec4<f32>();
    var odd = vec4<f32>();
    for (var key0 = 0u; key0 < visible; key0 += THREADS) {
        let key = key0 + thread;
        var score = -inf();
        if (key < visible) {
            var dot = vec4<f32>();
            for (var c = 0u; c < GROUPS; c++) {
                let k = eight_k_cache(of_cache + key * width + c * 8u);
                dot = fma(query[c].even, k.even, dot);
                dot = fma(query[c].odd, k.odd, dot);
            }
            score = p.scale * ((dot.x + dot.y) + (dot.z + dot.w));
        }
        let shrink = weigh(thread, score);
        even *= vec4<f32>(shrink);
        odd *= vec4<f32>(shrink);
        if (slice < SLICES) {
            for (var j = slice; j < min(THREADS, visible - key0); j += SLICES) {
                let v = eight_v_cache(of_cache + (key0 + j) * width + column);
                even = fma(vec4<f32>(weights[j]), v.even, even);
                odd = fma(vec4<f32>(weights[j]), v.odd, odd);
            }
        }
        workgroupBarrier();
    }
    mixed[2u * thread] = even;
    mixed[2u * thread + 1u] = odd;
    workgroupBarrier();
    if (thread < HEAD) {
        var total = 0.0f;
        for (var s = 0u; s < SLICES; s++) {
            total += mixed[2u * (s * GROUPS + thread / 8u) + thread % 2u][thread % 8u / 2u];
        }
        set_y(group * HEAD + thread, total / sum);
    }
}
