// The logits of a student and of its teacher, never in memory. Of the rows of each tile, for student, student at T (if SOFT) and teacher
// at T: the largest and the sum [n, tiles] each, in this order in `parts`; then the teacher's sum of exp(teacher - largest)
// (teacher - student). And the logit of each label. `colder` is 1 / T.

var<private> of_teacher: bool;

fn left(row: u32, k: u32) -> f32 {
    if (row >= p.n) { return 0.0f; }
    if (of_teacher) {
        if (k < p.width) { return get_teacher_x(row * p.width + k); }
    } else if (k < p.d) {
        return get_x(row * p.d + k);
    }
    return 0.0f;
}
fn right(k: u32, column: u32) -> f32 {
    if (column >= p.classes) { return 0.0f; }
    if (of_teacher) {
        if (k < p.width) { return get_teacher_w(column * p.width + k); }
    } else if (k < p.d) {
        return get_w(column * p.d + k);
    }
    return 0.0f;
}

fn kernel(group: vec3<u32>, thread: u32) {
    let row0 = group.y * TILE;
    let class0 = group.x * TILE;
    for (var which = 0u; which < 2u; which++) {
        of_teacher = which == 1u;
        gemm_tile(thread, row0, class0, select(p.d, p.width, of_teacher));
        for (var i = 0u; i < OWN; i++) {
            for (var j = 0u; j < OWN; j++) {
                let column = column_of(thread, j);
                let at = row_of(thread, i) * ACROSS + column;
                let v = select(-inf(), sums[i * OWN + j], class0 + column < p.classes);
                if (of_teacher) { teacher[at] = v; } else { student[at] = v; }
            }
        }
    }
    workgroupBarrier();
    let row = row0 + thread;
    if (thread >= TILE || row >= p.n) { return; }
    let all = p.n * p.tiles;
    let mine = thread * ACROSS;
    var to = row * p.tiles + group.x;
    student_sums(to, all, thread, 1.0f);
    to += 2u * all;
    if (SOFT) {
        student_sums(to, all, thread, p.colder);
        to += 2u * all;
    }
    var greatest = -inf();
    for (var c = 0u; c < TILE; c++) { greatest = max_nan(greatest, teacher[mine + c] * p.colder); }
    let shift = select(greatest, 0.0f, greatest == -inf());
    var total = 0.0f;
    var gap = 0.0f;
    for (var c = 0u; c < TILE && class0 + c < p.classes; c++) {
        let a = teacher[mine + c] * p.colder;
        total += e_to(a - shift);
        gap += e_to(a - greatest) * (a - student[mine + c] * p.colder);
    }
    put_sums(to, all, greatest, total);
    set_parts(to + 2u * all, gap);
    let label = get_labels(row);
    if (label >= 0 && u32(label) < p.classes && u32(label) / TILE == group.x) {
        set_of_label(row, student[mine + u32(label) % TILE]);
    }
}
