// The logits of a linear classifier, which are never in memory: a workgroup computes a tile of them and keeps of each row the largest
// and the sum of exponentials, in [n, tiles], and the logit of each row's label.

const ACROSS: u32 = TILE + 1u;
const LOGITS: u32 = TILE * ACROSS;

var<workgroup> logits: array<f32, LOGITS>;

fn kernel(group: vec3<u32>, thread: u32) {
    let row0 = group.y * TILE;
    let class0 = group.x * TILE;
    gemm_tile(thread, row0, class0, p.d);
    for (var i = 0u; i < OWN; i++) {
        for (var j = 0u; j < OWN; j++) {
            let column = column_of(thread, j);
            logits[row_of(thread, i) * ACROSS + column] =
                select(-inf(), sums[i * OWN + j], class0 + column < p.classes);
        }
    }
    workgroupBarrier();
    let row = row0 + thread;
    if (thread < TILE && row < p.n) {
        let mine = thread * ACROSS;
        var greatest = -inf();
        for (var c = 0u; c < TILE; c++) { greatest = max_nan(greatest, logits[mine + c]); }
        var total = 0.0f;
        for (var c = 0u; c < TILE; c++) { total += e_to(logits[mine + c] - greatest); }
        set_largest(row * p.tiles + group.x, greatest);
        set_total(row * p.tiles + group.x, total);
        let label = get_labels(row);
        if (label >= 0 && u32(label) < p.classes && u32(label) / TILE == group.x) {
            set_of_label(row, logits[mine + u32(label) % TILE]);
        }
    }
}
