// Behind a product, whose workgroups count themselves as they end: the last of ARRIVALS has the logits of all, and does what follows them.

var<workgroup> came: u32;

fn kernel(group: vec3<u32>, thread: u32) {
    product(group, thread);
    // What the workgroup has stored is there for whoever sees its count.
    storageBarrier();
    if (thread == 0u) { came = atomicAdd(&arrivals[0], 1u) + 1u; }
    if (workgroupUniformLoad(&came) < ARRIVALS) { return; }
    if (thread == 0u) { atomicStore(&arrivals[0], 0u); }
    storageBarrier();
    tail(thread);
}
