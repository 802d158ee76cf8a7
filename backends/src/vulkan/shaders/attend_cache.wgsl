// Attention over caches element by element, THREADS keys at a time, with the softmax kept up to date on the way: a thread has a key's
// score, then COLUMNS columns of the result.

var<workgroup> query: array<f32, HEAD>;
var<workgroup> weights: array<f32, THREADS>;
// Of the scores so far; the sum of their weights, which are relative to it.
var<private> greatest: f32;
var<private> sum: f32;

// Makes the weights of THREADS keys, of which each thread has one's score. Returns what everything before them shrinks by.
fn weigh(thread: u32, score: f32) -> f32 {
    let most = block_max(thread, max_nan(greatest, score));
    let shrink = e_to(greatest - most);
    let weight = e_to(score - most);
    weights[thread] = weight;
    // Also waits until all weights are there.
    sum = sum * shrink + block_sum(thread, weight);
    greatest = most;
    return shrink;
}

fn kernel(group: u32, thread: u32) {
    place(group);
    greatest = -inf();
    for (var c = thread; c < HEAD; c += THREADS) { query[c] = get_qkv(of_query + c); }
    workgroupBarrier();
    var acc: array<f32, COLUMNS>;
    for (var i = 0u; i < COLUMNS; i++) { acc[i] = 0.0f; }
    for (var key0 = 0u; key0 < visible; key0 += THREADS) {
        let key = key0 + thread;
        var score = -inf();
        if (key < visible) {
            var dot = 0.0f;
            for (var c = 0u; c < p.head; c++) { dot = fma(query[c], get_k_cache(of_cache + key * width + c), dot); }
            score = p.scale * dot;
        }
        let shrink = weigh(thread, score);
        for (var i = 0u; i < COLUMNS; i++) {
            let c = thread + i * THREADS;
            if (c < HEAD) {
                var mixed = 0.0f;
                for (var j = 0u; j < min(THREADS, visible - key0); j++) {
                    mixed = fma(weights[j], get_v_cache(of_cache + (key0 + j) * width + c), mixed);
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
