// dx of layer norm; of the root-mean-square norm where there is no mean. A workgroup for each row of d elements.

fn kernel(group: u32, thread: u32) {
    let row = group * p.d;
    let m = get_mean(select(0u, group, HAS_MEAN));
    let r = get_rstd(group);
    var sum_g = 0.0f;
    var sum_gh = 0.0f;
    for (var i = thread; i < p.d; i += THREADS) {
        let g = get_dy(row + i) * get_gamma(i);
        sum_g += g;
        sum_gh += g * ((get_x(row + i) - m) * r);
    }
    let mean_gh = block_sum(thread, sum_gh) / f32(p.d);
    var mean_g = 0.0f;
    if (HAS_MEAN) { mean_g = block_sum(thread, sum_g) / f32(p.d); }
    for (var i = thread; i < p.d; i += THREADS) {
        let g = get_dy(row + i) * get_gamma(i);
        set_dx(row + i, r * (g - mean_g - (get_x(row + i) - m) * r * mean_gh));
    }
}
