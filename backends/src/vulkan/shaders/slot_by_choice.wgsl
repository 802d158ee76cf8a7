// The one slot is that of the one choice of the one token, which every workgroup makes; one more, behind the ACROSS_ALL that have columns, leaves
// what routing and assigning leave.

fn apart(group: vec3<u32>, thread: u32) -> bool {
    if (group.x < ACROSS_ALL) { return false; }
    tail(thread);
    return true;
}
fn find_expert(thread: u32) -> u32 {
    let found = choice_of_first(thread);
    return select(p.experts, u32(found), found >= 0);
}
