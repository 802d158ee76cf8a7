// What norm_grad.wgsl says, of rows of a multiple of eight elements: a thread keeps up to OWN times eight of them.

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    let m = get_mean(select(0u, group, HAS_MEAN));
    let r = get_rstd(group);
    // The normalised elements, and their gradients.
    var h: array<Eight, OWN>;
    var g: array<Eight, OWN>;
    var sum_g = 0.0f;
    var sum_gh = 0.0f;
    for (var o = 0u; o < OWN; o++) {
        let i = (o * THREADS + thread) * 8u;
        if (i < p.d) {
            let x = eight_x(row + i);
            let dy = eight_dy(row + i);
            let scale = eight_gamma(i);
            h[o] = Eight((x.even - vec4<f32>(m)) * r, (x.odd - vec4<f32>(m)) * r);
            g[o] = Eight(dy.even * scale.even, dy.odd * scale.odd);
            sum_g += sum_of(g[o]);
            sum_gh += sum_of(Eight(g[o].even * h[o].even, g[o].odd * h[o].odd));
        }
    }
    let mean_gh = block_sum(thread, sum_gh) / f32(p.d);
    var mean_g = 0.0f;
    if (HAS_MEAN) { mean_g = block_sum(thread, sum_g) / f32(p.d); }
    for (var o = 0u; o < OWN; o++) {
        let i = (o * THREADS + thread) * 8u;
        if (i < p.d) {
            set_eight_dx(row + i, Eight(r * (g[o].even - vec4<f32>(mean_g) - h[o].even * mean_gh),
                r * (g[o].odd - vec4<f32>(mean_g) - h[o].odd * mean_gh)));
        }
    }
}
