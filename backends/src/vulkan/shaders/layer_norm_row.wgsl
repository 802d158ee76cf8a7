// Layer norm of the nth row of x, of WIDTH elements, a multiple of eight: NORMED threads keep up to OWN times eight elements of it. All that
// is read is asked for before the first sum. `leave_normed(nth, i, v)` gets eight elements from i on, `leave_statistics(nth, mean, rstd)`
// the others.

fn normalise(nth: u32, thread: u32) {
    var x: array<Eight, OWN>;
    var scale: array<Eight, OWN>;
    var shift: array<Eight, OWN>;
    for (var o = 0u; o < OWN; o++) {
        let i = own_at(o, thread);
        if (i < WIDTH) {
            x[o] = eight_x(nth * WIDTH + i);
            scale[o] = eight_gamma(i);
            shift[o] = eight_beta(i);
        }
    }
    var sum = 0.0f;
    for (var o = 0u; o < OWN; o++) { if (own_at(o, thread) < WIDTH) { sum += sum_of(x[o]); } }
    let m = block_sum(thread, sum) / f32(WIDTH);
    var squares = 0.0f;
    for (var o = 0u; o < OWN; o++) {
        if (own_at(o, thread) < WIDTH) {
            let far = Eight(x[o].even - vec4<f32>(m), x[o].odd - vec4<f32>(m));
            squares += sum_of(Eight(far.even * far.even, far.odd * far.odd));
        }
    }
    let r = 1.0f / sqrt(block_sum(thread, squares) / f32(WIDTH) + p.eps);
    for (var o = 0u; o < OWN; o++) {
        let i = own_at(o, thread);
        if (i < WIDTH) {
            leave_normed(nth, i, Eight((x[o].even - vec4<f32>(m)) * r * scale[o].even + shift[o].even,
                (x[o].odd - vec4<f32>(m)) * r * scale[o].odd + shift[o].odd));
        }
    }
    if (thread == 0u) { leave_statistics(nth, m, r); }
}
