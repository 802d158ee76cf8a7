// Layer norm over rows of d elements, a multiple of eight: a workgroup for each row, whose threads keep up to OWN times eight elements
// of it. All that is read is asked for before the first sum.

fn sum_of(v: Eight) -> f32 {
    let four = v.even + v.odd;
    return (four.x + four.y) + (four.z + four.w);
}

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    var x: array<Eight, OWN>;
    var scale: array<Eight, OWN>;
    var shift: array<Eight, OWN>;
    for (var o = 0u; o < OWN; o++) {
        let i = (o * THREADS + thread) * 8u;
        if (i < p.d) {
            x[o] = eight_x(row + i);
            scale[o] = eight_gamma(i);
            shift[o] = eight_beta(i);
        }
    }
    var sum = 0.0f;
    for (var o = 0u; o < OWN; o++) { if ((o * THREADS + thread) * 8u < p.d) { sum += sum_of(x[o]); } }
    let m = block_sum(thread, sum) / f32(p.d);
    var squares = 0.0f;
    for (var o = 0u; o < OWN; o++) {
        if ((o * THREADS + thread) * 8u < p.d) {
            let far = Eight(x[o].even - vec4<f32>(m), x[o].odd - vec4<f32>(m));
            squares += sum_of(Eight(far.even * far.even, far.odd * far.odd));
        }
    }
    let r = 1.0f / sqrt(block_sum(thread, squares) / f32(p.d) + p.eps);
    for (var o = 0u; o < OWN; o++) {
        let i = (o * THREADS + thread) * 8u;
        if (i < p.d) {
            set_eight_y(row + i, Eight((x[o].even - vec4<f32>(m)) * r * scale[o].even + shift[o].even,
                (x[o].odd - vec4<f32>(m)) * r * scale[o].odd + shift[o].odd));
        }
    }
    if (thread == 0u) {
        set_mean(group, m);
        set_rstd(group, r);
    }
}
