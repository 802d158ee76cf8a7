// Sums, maxima and the best over the lanes of a token, through the memory of the workgroup, in two steps.

const FEW: u32 = max(LANES / 4u, 1u);
const IN_TURN: u32 = LANES / FEW;

var<workgroup> room_of_few: array<f32, THREADS>;
var<workgroup> room_of_places: array<u32, THREADS>;
var<workgroup> room_of_few_places: array<u32, THREADS>;

fn lanes_sum(thread: u32, x: f32) -> f32 {
    room_of_tokens[thread] = x;
    workgroupBarrier();
    if (lane < FEW) {
        var some = room_of_tokens[thread];
        for (var i = 1u; i < IN_TURN; i++) { some += room_of_tokens[thread + i * FEW]; }
        room_of_few[thread] = some;
    }
    workgroupBarrier();
    var sum = room_of_few[first];
    for (var i = 1u; i < FEW; i++) { sum += room_of_few[first + i]; }
    return sum;
}
// The largest; NaN if any is.
fn lanes_max(thread: u32, x: f32) -> f32 {
    room_of_tokens[thread] = x;
    workgroupBarrier();
    if (lane < FEW) {
        var some = room_of_tokens[thread];
        for (var i = 1u; i < IN_TURN; i++) { some = max_nan(some, room_of_tokens[thread + i * FEW]); }
        room_of_few[thread] = some;
    }
    workgroupBarrier();
    var most = room_of_few[first];
    for (var i = 1u; i < FEW; i++) { most = max_nan(most, room_of_few[first + i]); }
    return most;
}
// Where the largest is; of equal ones the lowest.
fn best_of_lanes(thread: u32, own_best: f32, own_at: u32) -> u32 {
    var best = own_best;
    var at = own_at;
    room_of_tokens[thread] = best;
    room_of_places[thread] = at;
    workgroupBarrier();
    if (lane < FEW) {
        for (var i = 1u; i < IN_TURN; i++) {
            let r = room_of_tokens[thread + i * FEW];
            let e = room_of_places[thread + i * FEW];
            if (r > best || (r == best && e < at)) {
                best = r;
                at = e;
            }
        }
        room_of_few[thread] = best;
        room_of_few_places[thread] = at;
    }
    workgroupBarrier();
    best = room_of_few[first];
    at = room_of_few_places[first];
    for (var i = 1u; i < FEW; i++) {
        let r = room_of_few[first + i];
        let e = room_of_few_places[first + i];
        if (r > best || (r == best && e < at)) {
            best = r;
            at = e;
        }
    }
    return at;
}
