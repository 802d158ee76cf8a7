// The choice of the first token, which has one alone, for every thread: as routing makes it, with nothing left of it.

fn choice_of_first(thread: u32) -> i32 {
    begin(thread);
    look_at_by_lanes(thread, 0u);
    finite = all_finite();
    choose_by_lanes(thread, 0u, false);
    return choice;
}
