// c [n, width] for the `width` classes from `class0` on: dloss (q - [class = label]) + dkd T (s Q - P), where s is the sum of the
// teacher's probabilities and P that of a kept token, or the tail's share of another. `colder` is 1 / T.

fn left(row: u32, k: u32) -> f32 {
    if (row < p.n && k < p.d) { return get_x(row * p.d + k); }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (k < p.d && column < p.width) { return get_w((p.class0 + column) * p.d + k); }
    return 0.0f;
}

const ACROSS: u32 = TILE + 1u;
const LOGITS: u32 = TILE * ACROSS;

var<workgroup> logits: array<f32, LOGITS>;
// Those of a kept token hold its cotangent already.
var<workgroup> is_kept: array<u32, LOGITS>;

fn kernel(group: vec3<u32>, thread: u32) {
    let row0 = group.y * TILE;
    let column0 = group.x * TILE;
    gemm_tile(thread, row0, column0, p.d);
    for (var i = 0u; i < OWN; i++) {
        for (var j = 0u; j < OWN; j++) {
            let at = row_of(thread, i) * ACROSS + column_of(thread, j);
            logits[at] = sums[i * OWN + j];
            is_kept[at] = 0u;
        }
    }
    workgroupBarrier();
    let row = row0 + thread;
    if (thread >= TILE || row >= p.n) { return; }
    let mine = thread * ACROSS;
    let label = get_labels(row);
    var of_loss = get_dloss(row);
    var of_kd = get_dkd(row) * p.temperature;
    if (label >= i32(p.classes)) {
        reject(label);
        of_loss = nan();
        of_kd = nan();
    } else if (label < 0) {
        of_loss = 0.0f;
        of_kd = 0.0f;
    }
    let hard = get_lse(row);
    let soft = get_soft_lse(row);
    let tail = get_tail_lse(row);
    let p_tail = e_to(get_log_tail(row));
    let first = row * p.kept;
    var sum = p_tail;
    for (var k = 0u; k < p.kept; k++) { sum += e_to(get_log_p(first + k)); }
    for (var k = 0u; k <= p.kept; k++) {
        // The kept ones first, then all others.
        if (k < p.kept) {
            let id = get_ids(first + k);
            if (id < 0 || id >= i32(p.classes)) {
                reject(id);
            } else if (u32(id) >= p.class0 + column0 && u32(id) - p.class0 - column0 < min(TILE, p.width - column0)) {
                let at = mine + u32(id) - p.class0 - column0;
                logits[at] = own(logits[at], of_loss, of_kd, sum, hard, soft) - of_kd * e_to(get_log_p(first + k));
                is_kept[at] = 1u;
            }
            continue;
        }
        for (var c = 0u; c < min(TILE, p.width - column0); c++) {
            var v = logits[mine + c];
            // A class of the tail is at most all of it.
            if (is_kept[mine + c] == 0u) {
                v = own(v, of_loss, of_kd, sum, hard, soft) - of_kd * p_tail * e_to(min(v * p.colder - tail, 0.0f));
            }
            if (label >= 0 && p.class0 + column0 + c == u32(label)) { v -= of_loss; }
            set_c(row * p.width + column0 + c, v);
        }
    }
}

fn own(logit: f32, of_loss: f32, of_kd: f32, sum: f32, hard: f32, soft: f32) -> f32 {
    let q = e_to(logit - hard);
    if (SOFT) { return of_loss * q + of_kd * sum * e_to(logit * p.colder - soft); }
    return (of_loss + of_kd * sum) * q;
}
