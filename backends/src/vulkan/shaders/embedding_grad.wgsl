// The gradient of a table: a workgroup for each row of it and THREADS columns goes through all ids and adds up the rows of dy whose id
// is its own. So no two workgroups write one element, and the order of each sum is that of the ids.

var<workgroup> near: array<i32, THREADS>;
var<workgroup> found: atomic<u32>;

fn kernel(group: u32, thread: u32) {
    let row = i32(group / p.blocks);
    let column = group % p.blocks * THREADS + thread;
    var sum = 0.0f;
    for (var first = 0u; first < p.n; first += THREADS) {
        if (thread == 0u) { atomicStore(&found, 0u); }
        workgroupBarrier();
        near[thread] = -1;
        if (first + thread < p.n) {
            let id = get_ids(first + thread);
            if ((id < 0 || id >= i32(p.rows)) && group == 0u) { reject(id); }
            near[thread] = id;
            if (id == row) { atomicAdd(&found, 1u); }
        }
        workgroupBarrier();
        // Most rows have no id among these.
        if (atomicLoad(&found) > 0u && column < p.d) {
            var part = 0.0f;
            for (var i = 0u; i < THREADS; i++) {
                if (near[i] == row) { part += get_dy((first + i) * p.d + column); }
            }
            sum += part;
        }
        workgroupBarrier();
    }
    if (column < p.d) { set_y(u32(row) * p.d + column, sum); }
}
