// The rows of a product of few rows are in memory.

fn prepare(group: vec3<u32>, thread: u32) {}
fn left_eight(r: u32, k: u32) -> Eight { return eight_a(left_at(row0 + r, k)); }
