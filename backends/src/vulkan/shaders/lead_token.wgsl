// The row of the only slot is that of the only token.

fn prepare(group: vec3<u32>, thread: u32) {}
fn left_eight(r: u32, k: u32) -> Eight { return eight_a(k); }
