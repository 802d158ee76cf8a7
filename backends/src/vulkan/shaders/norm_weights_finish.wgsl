// The chunks of dgamma and dbeta together, in order.

fn kernel(group: u32, thread: u32) {
    let column = group * THREADS + thread;
    if (column >= p.d) { return; }
    var gamma = 0.0f;
    var beta = 0.0f;
    for (var chunk = 0u; chunk < p.chunks; chunk++) {
        gamma += get_gammas(chunk * p.d + column);
        beta += get_betas(chunk * p.d + column);
    }
    set_dgamma(column, gamma);
    set_dbeta(column, beta);
}
