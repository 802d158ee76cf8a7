// Sums and maxima over the first SUMMED threads of a workgroup, for all of them, in an order that depends on nothing but SUMMED, a multiple of
// 32 and at most 1024: first over the 32 lanes of a subgroup, then over those. One barrier; what threads wrote before is there for all of them behind it.

const SUBGROUPS: u32 = SUMMED / 32u;
const ROOMS: u32 = 2u * SUBGROUPS;

// Two rooms in turn: whoever writes a room has met all who read what was there before.
var<workgroup> room_of_sums: array<f32, ROOMS>;
var<workgroup> room_of_counts: array<i32, ROOMS>;
var<private> turn: u32;

fn block_sum(thread: u32, x: f32) -> f32 {
    var sum = x;
    for (var mask = 16u; mask > 0u; mask >>= 1u) { sum += subgroupShuffleXor(sum, mask); }
    if (THREADS == 32u) {
        workgroupBarrier();
        return sum;
    }
    turn = SUBGROUPS - turn;
    if (thread < SUMMED) { room_of_sums[turn + thread / 32u] = sum; }
    workgroupBarrier();
    sum = room_of_sums[turn];
    for (var i = 1u; i < SUBGROUPS; i++) { sum += room_of_sums[turn + i]; }
    return sum;
}

// The largest; NaN if any is.
fn block_max(thread: u32, x: f32) -> f32 {
    var greatest = x;
    for (var mask = 16u; mask > 0u; mask >>= 1u) { greatest = max_nan(greatest, subgroupShuffleXor(greatest, mask)); }
    if (THREADS == 32u) {
        workgroupBarrier();
        return greatest;
    }
    turn = SUBGROUPS - turn;
    if (thread < SUMMED) { room_of_sums[turn + thread / 32u] = greatest; }
    workgroupBarrier();
    greatest = room_of_sums[turn];
    for (var i = 1u; i < SUBGROUPS; i++) { greatest = max_nan(greatest, room_of_sums[turn + i]); }
    return greatest;
}

fn block_count(thread: u32, x: i32) -> i32 {
    var count = x;
    for (var mask = 16u; mask > 0u; mask >>= 1u) { count += subgroupShuffleXor(count, mask); }
    if (THREADS == 32u) {
        workgroupBarrier();
        return count;
    }
    turn = SUBGROUPS - turn;
    if (thread < SUMMED) { room_of_counts[turn + thread / 32u] = count; }
    workgroupBarrier();
    count = room_of_counts[turn];
    for (var i = 1u; i < SUBGROUPS; i++) { count += room_of_counts[turn + i]; }
    return count;
}
