// The largest and the sum of all tiles of a row, from those of each.

fn row_sums(thread: u32, first: u32, all: u32) -> vec2<f32> {
    var greatest = -inf();
    for (var t = thread; t < p.tiles; t += THREADS) { greatest = max_nan(greatest, get_parts(first + t)); }
    greatest = block_max(thread, greatest);
    let shift = select(greatest, 0.0f, greatest == -inf());
    var total = 0.0f;
    for (var t = thread; t < p.tiles; t += THREADS) {
        total += get_parts(first + all + t) * e_to(get_parts(first + t) - shift);
    }
    return vec2<f32>(greatest, block_sum(thread, total));
}

// Sets the loss of a row; whether the row counts for kd: 1, 0 for an ignored one, NaN for a bad label.
fn row_loss(row: u32, lse: f32) -> f32 {
    let label = get_labels(row);
    if (label >= i32(p.classes)) {
        reject(label);
        set_loss(row, nan());
        return nan();
    }
    if (label < 0) {
        set_loss(row, 0.0f);
        return 0.0f;
    }
    set_loss(row, lse - get_of_label(row));
    return 1.0f;
}
