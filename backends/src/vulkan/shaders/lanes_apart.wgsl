// What that lane has whose number differs in the bits of `mask`; lanes are 32 neighbouring threads, which exchange through the memory of
// the workgroup here: all of its threads come together.

var<workgroup> room_of_lanes: array<vec4<f32>, THREADS>;

fn other_four(thread: u32, v: vec4<f32>, mask: u32) -> vec4<f32> {
    room_of_lanes[thread] = v;
    workgroupBarrier();
    let other = room_of_lanes[thread ^ mask];
    workgroupBarrier();
    return other;
}
fn other_two(thread: u32, v: vec2<f32>, mask: u32) -> vec2<f32> {
    return other_four(thread, vec4<f32>(v, 0.0f, 0.0f), mask).xy;
}
fn other_one(thread: u32, v: f32, mask: u32) -> f32 { return other_four(thread, vec4<f32>(v), mask).x; }
