// The counted choices of each expert: a workgroup for each chunk of them, which has a part of `counts`.

var<workgroup> load: array<atomic<i32>, EXPERTS>;

fn kernel(group: u32, thread: u32) {
    for (var e = thread; e < EXPERTS; e += THREADS) { atomicStore(&load[e], 0); }
    workgroupBarrier();
    let last = min((group + 1u) * p.chunk, p.n * p.counted);
    for (var i = group * p.chunk + thread; i < last; i += THREADS) {
        let e = get_index(i / p.counted * p.k + i % p.counted);
        if (e >= 0 && e < i32(EXPERTS)) { atomicAdd(&load[e], 1); }
    }
    workgroupBarrier();
    for (var e = thread; e < EXPERTS; e += THREADS) { set_counts(group * EXPERTS + e, atomicLoad(&load[e])); }
}
