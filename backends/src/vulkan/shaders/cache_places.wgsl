// Attention of new tokens over caches [batch, room, kv_heads HEAD]: a workgroup for each token of the batch and head goes through the
// visible keys, THREADS at a time, with the softmax kept up to date on the way.

var<workgroup> weights: array<f32, THREADS>;

// Elements from a key to the next, and how many are visible.
var<private> width: u32;
var<private> visible: u32;
// Where the head's query, and its first key and value, begin.
var<private> of_query: u32;
var<private> of_cache: u32;
// Of the scores so far; the sum of their weights, which are relative to it.
var<private> greatest: f32;
var<private> sum: f32;

fn place(group: u32) {
    let h = group % p.heads;
    let row = group / p.heads;
    width = p.kv_heads * HEAD;
    visible = u32(clamp(get_start(0u), 0, i32(p.room - p.tokens))) + row % p.tokens + 1u;
    of_query = (row * (p.heads + 2u * p.kv_heads) + h) * HEAD;
    of_cache = row / p.tokens * p.room * width + h / (p.heads / p.kv_heads) * HEAD;
    greatest = -inf();
    sum = 0.0f;
}

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
