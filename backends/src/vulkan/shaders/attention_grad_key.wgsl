// The gradients of the keys and values of attention, summed over the query heads that share them. Groups: blocks of keys, kv heads,
// batch.

var<workgroup> q: array<f32, ROWS>;
var<workgroup> d: array<f32, ROWS>;
var<workgroup> k: array<f32, ROWS>;
var<workgroup> v: array<f32, ROWS>;
var<workgroup> weights: array<f32, SCORES>;
var<workgroup> slopes: array<f32, SCORES>;

fn kernel(group: vec3<u32>, thread: u32) {
    let g = group.y;
    let b = group.z;
    let first = group.x * BLOCK;
    let together = p.heads / p.kv_heads;
    let r = thread / LANES;
    let lane = thread % LANES;
    let key = first + r;
    for (var i = thread; i < BLOCK * HEAD; i += THREADS) {
        let t = i / HEAD;
        let c = i % HEAD;
        var x = 0.0f;
        var y = 0.0f;
        if (first + t < p.tokens) {
            x = get_qkv(key_at(b, g) + (first + t) * pitch() + c);
            y = get_qkv(value_at(b, g) + (first + t) * pitch() + c);
        }
        k[t * ACROSS + c] = x;
        v[t * ACROSS + c] = y;
    }
    var of_key: array<f32, COLUMNS>;
    var of_value: array<f32, COLUMNS>;
    for (var i = 0u; i < COLUMNS; i++) {
        of_key[i] = 0.0f;
        of_value[i] = 0.0f;
    }
    for (var h = g * together; h < (g + 1u) * together; h++) {
        // Queries before the block see none of its keys.
        for (var query0 = select(0u, first, p.causal == 1u); query0 < p.tokens; query0 += BLOCK) {
            workgroupBarrier();
            for (var i = thread; i < BLOCK * HEAD; i += THREADS) {
                let t = i / HEAD;
                let c = i % HEAD;
                var x = 0.0f;
                var y = 0.0f;
                if (query0 + t < p.tokens) {
                    x = get_qkv(query_at(b, h) + (query0 + t) * pitch() + c);
                    y = get_dy(result_at(b, h) + (query0 + t) * p.heads * HEAD + c);
                }
                q[t * ACROSS + c] = x;
                d[t * ACROSS + c] = y;
            }
            workgroupBarrier();
            for (var j = lane; j < BLOCK; j += LANES) {
                let query = query0 + j;
                var weight = 0.0f;
                var slope = 0.0f;
                if (key < p.tokens && query < p.tokens && (p.causal == 0u || key <= query)) {
                    var score = 0.0f;
                    var dot = 0.0f;
                    for (var c = 0u; c < p.head; c++) {
                        score = fma(q[j * ACROSS + c], k[r * ACROSS + c], score);
                        dot = fma(d[j * ACROSS + c], v[r * ACROSS + c], dot);
                    }
                    weight = e_to(p.scale * score - get_lse(row_at(b, h) + query));
                    slope = p.scale * weight * (dot - get_delta(row_at(b, h) + query));
                }
                weights[r * (BLOCK + 1u) + j] = weight;
                slopes[r * (BLOCK + 1u) + j] = slope;
            }
            workgroupBarrier();
            for (var i = 0u; i < COLUMNS; i++) {
                let c = lane + i * LANES;
                if (c < HEAD) {
                    var k_part = 0.0f;
                    var v_part = 0.0f;
                    for (var j = 0u; j < BLOCK; j++) {
                        k_part = fma(slopes[r * (BLOCK + 1u) + j], q[j * ACROSS + c], k_part);
                        v_part = fma(weights[r * (BLOCK + 1u) + j], d[j * ACROSS + c], v_part);
                    }
                    of_key[i] += k_part;
                    of_value[i] += v_part;
                }
            }
        }
    }
    if (key >= p.tokens) { return; }
    for (var i = 0u; i < COLUMNS; i++) {
        let c = lane + i * LANES;
        if (c < HEAD) {
            set_dqkv(key_at(b, g) + key * pitch() + c, of_key[i]);
            set_dqkv(value_at(b, g) + key * pitch() + c, of_value[i]);
        }
    }
}
