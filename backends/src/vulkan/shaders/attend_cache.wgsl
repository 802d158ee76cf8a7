// Attention over caches element by element: a thread has a key's score, then COLUMNS columns of the result.

var<workgroup> query: array<f32, HEAD>;

fn kernel(group: u32, thread: u32) {
    place(group);
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
