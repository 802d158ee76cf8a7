// Rows of a table by id: a workgroup for each id. An id without a row is rejected and gives NaN.

fn kernel(group: u32, thread: u32) {
    let id = get_ids(group);
    let known = id >= 0 && id < i32(p.rows);
    if (!known && thread == 0u) { reject(id); }
    for (var c = thread; c < p.d; c += THREADS) {
        var v = nan();
        if (known) { v = get_table(u32(id) * p.d + c); }
        set_y(group * p.d + c, v);
    }
}
