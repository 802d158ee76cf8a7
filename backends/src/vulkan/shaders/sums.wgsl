// Sums and maxima over a workgroup, for all of its threads, in an order that depends on nothing but THREADS, a power of 2.

var<workgroup> room: array<f32, THREADS>;
var<workgroup> room_of_counts: array<i32, THREADS>;

fn block_sum(thread: u32, x: f32) -> f32 {
    room[thread] = x;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half >>= 1u) {
        if (thread < half) { room[thread] += room[thread + half]; }
        workgroupBarrier();
    }
    let sum = room[0];
    workgroupBarrier();
    return sum;
}

// The largest; NaN if any is.
fn block_max(thread: u32, x: f32) -> f32 {
    room[thread] = x;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half >>= 1u) {
        if (thread < half) { room[thread] = max_nan(room[thread], room[thread + half]); }
        workgroupBarrier();
    }
    let greatest = room[0];
    workgroupBarrier();
    return greatest;
}

fn block_count(thread: u32, x: i32) -> i32 {
    room_of_counts[thread] = x;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half >>= 1u) {
        if (thread < half) { room_of_counts[thread] += room_of_counts[thread + half]; }
        workgroupBarrier();
    }
    let sum = room_of_counts[0];
    workgroupBarrier();
    return sum;
}
