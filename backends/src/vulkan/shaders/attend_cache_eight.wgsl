// Attention of new tokens over caches [batch, room, kv_heads HEAD], HEAD a multiple of eight: a workgroup for each token of the batch
// and head goes through the visible keys, THREADS at a time, with the softmax kept up to date on the way. A thread has a key's score,
// then eight columns of the result over every SLICES-th key.

const GROUPS: u32 = HEAD / 8u;
const SLICES: u32 = THREADS / GROUPS;
const MIXED: u32 = 2u * THREADS;

var<workgroup> query: array<Eight, GROUPS>;
var<workgroup> weights: array<f32, THREADS>;
var<workgroup> mixed: array<vec4<f32>, MIXED>;

fn kernel(group: u32, thread: u32) {
    let h = group % p.heads;
    let row = group / p.heads;
    let b = row / p.tokens;
    let width = p.kv_heads * HEAD;
    let visible = u32(clamp(get_start(0u), 0, i32(p.room - p.tokens))) + row % p.tokens + 1u;
    let cache = b * p.room * width + h / (p.heads / p.kv_heads) * HEAD;
    if (thread < GROUPS) { query[thread] = eight_qkv((row * (p.heads + 2u * p.kv_heads) + h) * HEAD + thread * 8u); }
    workgroupBarrier();
    let column = thread % GROUPS * 8u;
    let slice = thread / GROUPS;
    var even = vec4<f32>();
    var odd = vec4<f32>();
    var greatest = -inf();
    var sum = 0.0f;
    for (var key0 = 0u; key0 < visible; key0 += THREADS) {
        let key = key0 + thread;
        var score = -inf();
        if (key < visible) {
            var dot = vec4<f32>();
            for (var c = 0u; c < GROUPS; c++) {
                let k = eight_k_cache(cache + key * width + c * 8u);
                dot = fma(query[c].even, k.even, dot);
                dot = fma(query[c].odd, k.odd, dot);
            }
            score = p.scale * ((dot.x + dot.y) + (dot.z + dot.w));
        }
        let most = block_max(thread, max_nan(greatest, score));
        let shrink = e_to(greatest - most);
        let weight = e_to(score - most);
        weights[thread] = weight;
        // Also waits until all weights are there.
        sum = sum * shrink + block_sum(thread, weight);
        greatest = most;
        even *= vec4<f32>(shrink);
        odd *= vec4<f32>(shrink);
        if (slice < SLICES) {
            for (var j = slice; j < min(THREADS, visible - key0); j += SLICES) {
                let v = eight_v_cache(cache + (key0 + j) * width + column);
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
