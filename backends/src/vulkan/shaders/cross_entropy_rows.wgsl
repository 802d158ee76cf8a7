// The tiles of a row of logits together: a workgroup for each row.

fn kernel(row: u32, thread: u32) {
    let first = row * p.tiles;
    var greatest = -inf();
    for (var t = thread; t < p.tiles; t += THREADS) { greatest = max_nan(greatest, get_largest(first + t)); }
    greatest = block_max(thread, greatest);
    var total = 0.0f;
    for (var t = thread; t < p.tiles; t += THREADS) {
        // A tile of -inf alone has a sum of NaN and adds nothing.
        let largest = get_largest(first + t);
        if (!(largest == -inf()) || greatest == -inf()) { total += get_total(first + t) * e_to(largest - greatest); }
    }
    total = block_sum(thread, total);
    if (thread > 0u) { return; }
    let l = greatest + ln(total);
    let label = get_labels(row);
    set_lse(row, l);
    if (label >= i32(p.classes)) {
        reject(label);
        set_loss(row, nan());
    } else {
        set_loss(row, select(l - get_of_label(row), 0.0f, label < 0));
    }
}
