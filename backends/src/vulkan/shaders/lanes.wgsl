// What that lane has whose number differs in the bits of `mask`; lanes are 32 neighbouring threads, which are a subgroup here.

fn other_four(thread: u32, v: vec4<f32>, mask: u32) -> vec4<f32> { return subgroupShuffleXor(v, mask); }
fn other_two(thread: u32, v: vec2<f32>, mask: u32) -> vec2<f32> { return subgroupShuffleXor(v, mask); }
fn other_one(thread: u32, v: f32, mask: u32) -> f32 { return subgroupShuffleXor(v, mask); }
