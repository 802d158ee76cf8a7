// The sums over a chunk of rows that dgamma and (with a mean) dbeta are made of: a thread for each column and chunk.

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (i >= p.chunks * p.d) { return; }
    let column = i % p.d;
    let first = i / p.d * p.chunk;
    var gamma = 0.0f;
    var beta = 0.0f;
    for (var r = first; r < min(first + p.chunk, p.rows); r++) {
        let at = r * p.d + column;
        let g = get_dy(at);
        gamma += g * ((get_x(at) - get_mean(r)) * get_rstd(r));
        beta += g;
    }
    set_gammas(i, gamma);
    set_betas(i, beta);
}
