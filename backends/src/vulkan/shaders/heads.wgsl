// Where the heads lie in packed queries, keys and values [batch, tokens, (heads + 2 kv_heads) HEAD], and what the kernels of attention
// share. A row of a block belongs to LANES neighbouring threads: thread `lane` of them has the keys (queries) lane, lane + LANES, ..
// and the columns lane, lane + LANES, .. of the result, COLUMNS in all.

// Rows of a block lie in different banks.
const ACROSS: u32 = HEAD + 1u;
const ROWS: u32 = BLOCK * ACROSS;
const SCORES: u32 = BLOCK * (BLOCK + 1u);

fn pitch() -> u32 { return (p.heads + 2u * p.kv_heads) * HEAD; }
fn query_at(b: u32, h: u32) -> u32 { return b * p.tokens * pitch() + h * HEAD; }
fn key_at(b: u32, g: u32) -> u32 { return query_at(b, p.heads + g); }
fn value_at(b: u32, g: u32) -> u32 { return query_at(b, p.heads + p.kv_heads + g); }
fn result_at(b: u32, h: u32) -> u32 { return (b * p.tokens * p.heads + h) * HEAD; }
fn row_at(b: u32, h: u32) -> u32 { return (b * p.heads + h) * p.tokens; }

var<workgroup> exchange: array<f32, THREADS>;

fn row_sum(thread: u32, x: f32) -> f32 {
    exchange[thread] = x;
    workgroupBarrier();
    let first = thread / LANES * LANES;
    var sum = 0.0f;
    for (var i = first; i < first + LANES; i++) { sum += exchange[i]; }
    workgroupBarrier();
    return sum;
}
fn row_max(thread: u32, x: f32) -> f32 {
    exchange[thread] = x;
    workgroupBarrier();
    let first = thread / LANES * LANES;
    var greatest = -inf();
    for (var i = first; i < first + LANES; i++) { greatest = max_nan(greatest, exchange[i]); }
    workgroupBarrier();
    return greatest;
}
