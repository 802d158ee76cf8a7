// Sums, maxima and the best over the lanes of a token, which are of one subgroup.

fn lanes_sum(thread: u32, x: f32) -> f32 {
    var sum = x;
    for (var mask = LANES / 2u; mask > 0u; mask >>= 1u) { sum += subgroupShuffleXor(sum, mask); }
    return sum;
}
// The largest; NaN if any is.
fn lanes_max(thread: u32, x: f32) -> f32 {
    var most = x;
    for (var mask = LANES / 2u; mask > 0u; mask >>= 1u) { most = max_nan(most, subgroupShuffleXor(most, mask)); }
    return most;
}
// Where the largest is; of equal ones the lowest.
fn best_of_lanes(thread: u32, own_best: f32, own_at: u32) -> u32 {
    var best = own_best;
    var at = own_at;
    for (var mask = LANES / 2u; mask > 0u; mask >>= 1u) {
        let r = subgroupShuffleXor(best, mask);
        let e = subgroupShuffleXor(at, mask);
        if (r > best || (r == best && e < at)) {
            best = r;
            at = e;
        }
    }
    return at;
}
