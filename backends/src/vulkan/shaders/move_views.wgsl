// A copy between strided views: transpose, broadcast, slice, pad, concat. A thread moves one element; neighbours in the last axis
// belong to neighbouring threads. Axes that are not there have an extent of 1.

fn kernel(group: u32, thread: u32) {
    var i = group * THREADS + thread;
    if (i >= p.elements) { return; }
    var read = p.from_at;
    var write = p.to_at;
    AXES
    set_sink(write, get_source(read));
}
