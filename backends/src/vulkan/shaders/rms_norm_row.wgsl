// Root-mean-square norm of the nth row of x, of WIDTH elements, a multiple of eight: NORMED threads keep up to OWN times eight elements of
// it. All that is read is asked for before the first sum. `leave_normed(nth, i, v)` gets eight elements from i on,
// `leave_statistics(nth, mean, rstd)` the other one; there is no mean.

fn normalise(nth: u32, thread: u32) {
    var x: array<Eight, OWN>;
    var scale: array<Eight, OWN>;
    for (var o = 0u; o < OWN; o++) {
        let i = own_at(o, thread);
        if (i < WIDTH) {
            x[o] = eight_x(nth * WIDTH + i);
            scale[o] = eight_gamma(i);
        }
    }
    var squares = 0.0f;
    for (var o = 0u; o < OWN; o++) {
        if (own_at(o, thread) < WIDTH) {
            squares += sum_of(Eight(x[o].even * x[o].even, x[o].odd * x[o].odd));
        }
    }
    let r = 1.0f / sqrt(block_sum(thread, squares) / f32(WIDTH) + p.eps);
    for (var o = 0u; o < OWN; o++) {
        let i = own_at(o, thread);
        if (i < WIDTH) { leave_normed(nth, i, Eight(x[o].even * r * scale[o].even, x[o].odd * r * scale[o].odd)); }
    }
    if (thread == 0u) { leave_statistics(nth, 0.0f, r); }
}
