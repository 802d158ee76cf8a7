// The one slot is that of the one choice of the one token, which every workgroup makes.

fn find_expert(thread: u32) -> u32 {
    let found = choice_of_first(thread);
    return select(p.experts, u32(found), found >= 0);
}
