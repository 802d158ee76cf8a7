// Softmax over rows of d elements: a workgroup for each row.

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    var greatest = -inf();
    for (var i = thread; i < p.d; i += THREADS) { greatest = max_nan(greatest, get_x(row + i)); }
    greatest = block_max(thread, greatest);
    // A NaN, and a row of -inf, make the sum NaN.
    var sum = 0.0f;
    for (var i = thread; i < p.d; i += THREADS) { sum += e_to(get_x(row + i) - greatest); }
    sum = block_sum(thread, sum);
    for (var i = thread; i < p.d; i += THREADS) { set_y(row + i, e_to(get_x(row + i) - greatest) / sum); }
}
