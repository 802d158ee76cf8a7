// The expert of a slot is that in whose segment it lies.

var<workgroup> of_slot: u32;

fn find_expert(thread: u32) -> u32 {
    // What is asked for before the barrier is not waited for behind it.
    var found = p.experts;
    for (var e = thread; e < p.experts; e += THREADS) {
        if (u32(get_offsets(e)) <= slot && slot < u32(get_offsets(e + 1u))) { found = e; }
    }
    if (thread == 0u) { of_slot = p.experts; }
    workgroupBarrier();
    if (found < p.experts) { of_slot = found; }
    workgroupBarrier();
    return of_slot;
}
