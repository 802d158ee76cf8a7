// Sums and maxima over the first SUMMED threads of a workgroup, for all of them, in an order that depends on nothing but SUMMED, a power of 2
// and at least 16: first of every sixteenth thread, then of those. Two barriers; what threads wrote before is there for all of them behind one.

const IN_TURN: u32 = SUMMED / 16u;

var<workgroup> room: array<f32, THREADS>;
var<workgroup> room_of_few: array<f32, 16>;
var<workgroup> room_of_counts: array<i32, THREADS>;
var<workgroup> room_of_few_counts: array<i32, 16>;

fn block_sum(thread: u32, x: f32) -> f32 {
    room[thread] = x;
    workgroupBarrier();
    if (thread < 16u) {
        var some = room[thread];
        for (var i = 1u; i < IN_TURN; i++) { some += room[i * 16u + thread]; }
        room_of_few[thread] = some;
    }
    workgroupBarrier();
    var sum = vec4<f32>();
    for (var i = 0u; i < 16u; i += 4u) {
        sum += vec4<f32>(room_of_few[i], room_of_few[i + 1u], room_of_few[i + 2u], room_of_few[i + 3u]);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// The largest; NaN if any is.
fn block_max(thread: u32, x: f32) -> f32 {
    room[thread] = x;
    workgroupBarrier();
    if (thread < 16u) {
        var some = room[thread];
        for (var i = 1u; i < IN_TURN; i++) { some = max_nan(some, room[i * 16u + thread]); }
        room_of_few[thread] = some;
    }
    workgroupBarrier();
    var greatest = room_of_few[0];
    for (var i = 1u; i < 16u; i++) { greatest = max_nan(greatest, room_of_few[i]); }
    return greatest;
}

fn block_count(thread: u32, x: i32) -> i32 {
    room_of_counts[thread] = x;
    workgroupBarrier();
    if (thread < 16u) {
        var some = room_of_counts[thread];
        for (var i = 1u; i < IN_TURN; i++) { some += room_of_counts[i * 16u + thread]; }
        room_of_few_counts[thread] = some;
    }
    workgroupBarrier();
    var count = 0;
    for (var i = 0u; i < 16u; i++) { count += room_of_few_counts[i]; }
    return count;
}
