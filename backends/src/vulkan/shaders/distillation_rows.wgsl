// The tiles of a row together: a workgroup for each row.

fn kernel(row: u32, thread: u32) {
    let all = p.n * p.tiles;
    var first = row * p.tiles;
    var found = row_sums(thread, first, all);
    let hard = found.x + ln(found.y);
    var soft = hard;
    first += 2u * all;
    if (SOFT) {
        found = row_sums(thread, first, all);
        soft = found.x + ln(found.y);
        first += 2u * all;
    }
    found = row_sums(thread, first, all);
    var gap = 0.0f;
    for (var t = thread; t < p.tiles; t += THREADS) {
        gap += get_parts(first + 2u * all + t) * e_to(get_parts(first + t) - found.x);
    }
    gap = block_sum(thread, gap);
    if (thread > 0u) { return; }
    let of_teacher = found.x + ln(found.y);
    set_lse(row, hard);
    set_soft_lse(row, soft);
    set_teacher_lse(row, of_teacher);
    let counts = row_loss(row, hard);
    let kd = counts * p.temperature * p.temperature * (gap / found.y + (soft - of_teacher));
    set_kd(row, select(kd, 0.0f, counts == 0.0f));
}
