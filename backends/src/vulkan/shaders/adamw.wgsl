// One step of AdamW in place: a thread for each element. `rounded`, if there is one, is kept equal to param, rounded.

fn kernel(group: u32, thread: u32) {
    let i = group * THREADS + thread;
    if (!begin_step() || i >= p.n) { return; }
    let moment = moments(i, get_m(i), get_v(i));
    set_m(i, moment.x);
    set_v(i, moment.y);
    move_param(i, moment);
}
