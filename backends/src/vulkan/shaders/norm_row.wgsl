// What threads have of a row of WIDTH elements, a multiple of eight, which NORMED of them share: eight at a time, OWN times.

// The first of a thread's elements; WIDTH where there are none.
fn own_at(o: u32, thread: u32) -> u32 { return select(WIDTH, (o * NORMED + thread) * 8u, thread < NORMED); }
