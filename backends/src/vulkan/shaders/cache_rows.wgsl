// New keys and values to their rows of the caches: a workgroup for each token of the batch.

fn kernel(group: u32, thread: u32) {
    let width = p.kv_heads * HEAD;
    let start = get_start(0u);
    let row = clamp(start, 0, i32(p.room - p.tokens));
    if (row != start && group == 0u && thread == 0u) { reject(start); }
    let first = (group * (p.heads + 2u * p.kv_heads) + p.heads) * HEAD;
    let to = (group / p.tokens * p.room + u32(row) + group % p.tokens) * width;
    for (var i = thread; i < width; i += THREADS) {
        set_k_cache(to + i, get_qkv(first + i));
        set_v_cache(to + i, get_qkv(first + width + i));
    }
}
