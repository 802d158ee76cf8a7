// Distillation from what is kept of a teacher: the log-probabilities of its likeliest tokens, and of all others together. Of the rows of
// each tile of the student's logits: the largest and the sum [n, tiles] of all classes (if SOFT), then of those that are not
// kept, at T. And the logits of the kept tokens at T, and of each label.

fn kernel(group: vec3<u32>, thread: u32) {
    let row0 = group.y * TILE;
    let class0 = group.x * TILE;
    gemm_tile(thread, row0, class0, p.d);
    for (var i = 0u; i < OWN; i++) {
        for (var j = 0u; j < OWN; j++) {
            let column = column_of(thread, j);
            student[row_of(thread, i) * ACROSS + column] =
                select(-inf(), sums[i * OWN + j], class0 + column < p.classes);
        }
    }
    workgroupBarrier();
    let row = row0 + thread;
    if (thread >= TILE || row >= p.n) { return; }
    let all = p.n * p.tiles;
    let mine = thread * ACROSS;
    var to = row * p.tiles + group.x;
    if (SOFT) {
        student_sums(to, all, thread, 1.0f);
        to += 2u * all;
    }
    let label = get_labels(row);
    if (label >= 0 && u32(label) < p.classes && u32(label) / TILE == group.x) {
        set_of_label(row, student[mine + u32(label) % TILE]);
    }
    for (var i = row * p.kept; i < (row + 1u) * p.kept; i++) {
        let id = get_ids(i);
        if (id < 0 || id >= i32(p.classes)) {
            reject(id);
        } else if (u32(id) / TILE == group.x) {
            set_kept_logits(i, student[mine + u32(id) % TILE] * p.colder);
            student[mine + u32(id) % TILE] = -inf();
        }
    }
    student_sums(to, all, thread, p.colder);
}
