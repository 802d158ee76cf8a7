// Attention without ever holding tokens x tokens scores (Dao et al., arXiv 2205.14135): a workgroup takes BLOCK queries of one head and
// walks over the keys in blocks, with the softmax kept up to date on the way. Groups: blocks of queries, heads, batch.

var<workgroup> q: array<f32, ROWS>;
var<workgroup> k: array<f32, ROWS>;
var<workgroup> v: array<f32, ROWS>;
var<workgroup> weights: array<f32, SCORES>;

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
        var x = 0.0f;
        if (first + t < p.tokens) { x = get_qkv(query_at(b, h) + (first + t) * pitch() + i % HEAD); }
        q[t * ACROSS + i % HEAD] = x;
    }
    var greatest = -inf();
    var sum = 0.0f;
    var acc: array<f32, COLUMNS>;
    for (var i = 0u; i < COLUMNS; i++) { acc[i] = 0.0f; }
    let end = select(p.tokens, min(first + BLOCK, p.tokens), p.causal == 1u);
    for (var key0 = 0u; key0 < end; key0 += BLOCK) {
        // Nobody reads the last block's keys and values any more.
        workgroupBarrier();
        for (var i = thread; i < BLOCK * HEAD; i += THREADS) {
            let t = i / HEAD;
            var x = 0.0f;
            var y = 0.0f;
            if (key0 + t < p.tokens) {
                x = get_qkv(key_at(b, g) + (key0 + t) * pitch() + i % HEAD);
                y = get_qkv(value_at(b, g) + (key0 + t) * pitch() + i % HEAD);
            }
            k[t * ACROSS + i % HEAD] = x;
            v[t * ACROSS + i % HEAD] = y;
        }
        workgroupBarrier();
        var most = greatest;
        for (var j = lane; j < BLOCK; j += LANES) {
            let key = key0 + j;
            var score = -inf();
            if (key < p.tokens && (p.causal == 0u || key <= query)) {
                var dot = 0.0f;
                for (var c = 0u; c < p.head; c++) { dot = fma(q[r * ACROSS + c], k[j * ACROSS + c], dot); }
                score = p.scale * dot;
            }
            weights[r * (BLOCK + 1u) + j] = score;
            most = max_nan(most, score);
        }
        most = row_max(thread, most);
        // A row of which nothing is visible yet (beyond the last token) stays at -inf.
        let nothing = most == -inf();
        let shrink = select(e_to(greatest - most), 1.0f, nothing);
        var total = 0.0f;
        for (var j = lane; j < BLOCK; j += LANES) {
            let weight = select(e_to(weights[r * (BLOCK + 1u) + j] - most), 0.0f, nothing);
            total += weight;
            weights[r * (BLOCK + 1u) + j] = weight;
        }
        // Also waits until all weights are there.
        sum = sum * shrink + row_sum(thread, total);
        greatest = most;
        for (var i = 0u; i < COLUMNS; i++) {
            let c = lane + i * LANES;
            if (c < HEAD) {
                var mixed = 0.0f;
                for (var j = 0u; j < BLOCK; j++) { mixed = fma(weights[r * (BLOCK + 1u) + j], v[j * ACROSS + c], mixed); }
                acc[i] = acc[i] * shrink + mixed;
            }
        }
    }
    if (query >= p.tokens) { return; }
    for (var i = 0u; i < COLUMNS; i++) {
        let c = lane + i * LANES;
        if (c < HEAD) { set_y(result_at(b, h) + query * p.heads * HEAD + c, acc[i] / sum); }
    }
    if (lane == 0u) { set_lse(row_at(b, h) + query, greatest + ln(sum)); }
}
