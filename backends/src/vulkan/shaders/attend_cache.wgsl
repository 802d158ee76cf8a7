// Attention of new tokens over caches [batch, room, kv_heads HEAD]: a workgroup for each token of the batch and head goes through the
// visible keys, THREADS at a time, with the softmax kept up to date on the way. A thread has a key's score, then COLUMNS columns
// of the result.

var<workgroup> query: array<f32, HEAD>;
var<workgroup> weights: array<f32, THREADS>;

fn kernel(group: u32, thread: u32) {
    let h = group % p.heads;
    let row = group / p.heads;
    let b = row / p.tokens;
    let width = p.kv_heads * HEAD;
    let visible = u32(clamp(get_start(0u), 0, i32(p.room - p.tokens))) + row % p.tokens + 1u;
    let cache = b * p.room * width + h / (p.heads / p.kv_heads) * HEAD;
    for (var c = thread; c < HEAD; c += THREADS) {
        query[c] = get_qkv((row * (p.heads + 2u * p.kv_heads) + h) * HEAD + c);
    }
    workgroupBarrier();
    var acc: array<f32, COLUMNS>;
    for (var i = 0u; i < COLUMNS; i++) { acc[i] = 0.0f; }
    var greatest = -inf();
    var sum = 0.0f;
    for (var key0 = 0u; key0 < visible; key0 += THREADS) {
        let key = key0 + thread;
        var score = -inf();
        if (key < visible) {
            var dot = 0.0f;
            for (var c = 0u; c < p.head; c++) { dot = fma(query[c], get_k_cache(cache + key * width + c), dot); }
            score = p.scale * dot;
        }
        let most = block_max(thread, max_nan(greatest, score));
        let shrink = e_to(greatest - most);
        let weight = e_to(score - most);
        weights[thread] = weight;
        // Also waits until all weights are there.
        sum = sum * shrink + block_sum(thread, weight);
        greatest = most;
        for (var i = 0u; i < COLUMNS; i++) {
            let c = thread + i * THREADS;
            if (c < HEAD) {
                var mixed = 0.0f;
                for (var j = 0u; j < min(THREADS, visible - key0); j++) {
                    mixed = fma(weights[j], get_v_cache(cache + (key0 + j) * width + c), mixed);
                }
                acc[i] = acc[i] * shrink + mixed;
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < COLUMNS; i++) {
        let c = thread + i * THREADS;
        if (c < HEAD) { set_y(group * HEAD + c, acc[i] / sum); }
    }
}
