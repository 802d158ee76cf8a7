// The gradient of the queries of attention. Groups: blocks of queries, heads, batch.

var<workgroup> q: array<f32, ROWS>;
var<workgroup> d: array<f32, ROWS>;
var<workgroup> k: array<f32, ROWS>;
var<workgroup> v: array<f32, ROWS>;
var<workgroup> slopes: array<f32, SCORES>;

fn kernel(group: vec3<u32>, thread: u32) {
    let h = group.y;
    let b = group.z;
    let g = h / (p.heads / p.kv_heads);
    let first = group.x * BLOCK;
    let r = thread / LANES;
    let lane = thread % LANES;
    let query = first + r;
    for (var i = thread; i < BLOCK * HEAD; i += THREADS) {
        let t = i / HEAD;
        let c = i % HEAD;
        var x = 0.0f;
        var y = 0.0f;
        if (first + t < p.tokens) {
            x = get_qkv(query_at(b, h) + (first + t) * pitch() + c);
            y = get_dy(result_at(b, h) + (first + t) * p.heads * HEAD + c);
        }
        q[t * ACROSS + c] = x;
        d[t * ACROSS + c] = y;
    }
    let real = query < p.tokens;
    var lse = 0.0f;
    var delta = 0.0f;
    if (real) {
        lse = get_lse(row_at(b, h) + query);
        delta = get_delta(row_at(b, h) + query);
    }
    var acc: array<f32, COLUMNS>;
    for (var i = 0u; i < COLUMNS; i++) { acc[i] = 0.0f; }
    let end = select(p.tokens, min(first + BLOCK, p.tokens), p.causal == 1u);
    for (var key0 = 0u; key0 < end; key0 += BLOCK) {
        workgroupBarrier();
        for (var i = thread; i < BLOCK * HEAD; i += THREADS) {
            let t = i / HEAD;
            let c = i % HEAD;
            var x = 0.0f;
            var y = 0.0f;
            if (key0 + t < p.tokens) {
                x = get_qkv(key_at(b, g) + (key0 + t) * pitch() + c);
                y = get_qkv(value_at(b, g) + (key0 + t) * pitch() + c);
            }
            k[t * ACROSS + c] = x;
            v[t * ACROSS + c] = y;
        }
        workgroupBarrier();
        for (var j = lane; j < BLOCK; j += LANES) {
            let key = key0 + j;
            var slope = 0.0f;
            if (real && key < p.tokens && (p.causal == 0u || key <= query)) {
                var score = 0.0f;
                var dot = 0.0f;
                for (var c = 0u; c < p.head; c++) {
                    score = fma(q[r * ACROSS + c], k[j * ACROSS + c], score);
                    dot = fma(d[r * ACROSS + c], v[j * ACROSS + c], dot);
                }
                slope = p.scale * e_to(p.scale * score - lse) * (dot - delta);
            }
            slopes[r * (BLOCK + 1u) + j] = slope;
        }
        workgroupBarrier();
        for (var i = 0u; i < COLUMNS; i++) {
            let c = lane + i * LANES;
            if (c < HEAD) {
                var mixed = 0.0f;
                for (var j = 0u; j < BLOCK; j++) { mixed = fma(slopes[r * (BLOCK + 1u) + j], k[j * ACROSS + c], mixed); }
                acc[i] += mixed;
            }
        }
    }
    if (!real) { return; }
    for (var i = 0u; i < COLUMNS; i++) {
        let c = lane + i * LANES;
        if (c < HEAD) { set_dqkv(query_at(b, h) + query * pitch() + c, acc[i]); }
    }
}
