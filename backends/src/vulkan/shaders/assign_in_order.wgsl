// Slots for the chosen experts, first come, first served: a workgroup for each chunk of the choices [choices], a multiple of THREADS, itself one of 16.
// `chunk_counts` has the choices of each expert in each chunk; without it there is one chunk. LIMITED: no expert keeps more than `capacity`.

// Experts of a thread in the sum of those before.
const EACH: u32 = (EXPERTS + THREADS - 1u) / THREADS;
// Threads whose counts one of 16 adds up.
const OF_TOP: u32 = THREADS / 16u;
const PITCHED: u32 = THREADS + 16u;

// Choices of an expert in all chunks; in those before and, later, of this one so far; the first slot.
var<workgroup> load: array<atomic<i32>, EXPERTS>;
var<workgroup> before: array<atomic<i32>, EXPERTS>;
var<workgroup> begins: array<i32, EXPERTS>;
var<workgroup> chosen: array<i32, THREADS>;
var<workgroup> scan: array<i32, PITCHED>;
var<workgroup> tops: array<i32, 16>;
var<workgroup> lost: atomic<i32>;

// What lower threads have, and what all have.
fn lower(thread: u32, x: i32) -> vec2<i32> {
    scan[thread + thread / OF_TOP] = x;
    workgroupBarrier();
    if (thread < 16u) {
        var sum = 0;
        for (var i = 0u; i < OF_TOP; i++) {
            let at = thread * (OF_TOP + 1u) + i;
            let here = scan[at];
            scan[at] = sum;
            sum += here;
        }
        tops[thread] = sum;
    }
    workgroupBarrier();
    var sum = scan[thread + thread / OF_TOP];
    var all = 0;
    for (var i = 0u; i < 16u; i++) {
        if (i < thread / OF_TOP) { sum += tops[i]; }
        all += tops[i];
    }
    return vec2<i32>(sum, all);
}
fn kept(e: u32) -> i32 {
    let here = atomicLoad(&load[e]);
    if (LIMITED) { return min(here, i32(p.capacity)); }
    return here;
}
// The expert of a choice, or -1.
fn expert_of(c: u32) -> i32 {
    let e = get_index(c);
    return select(-1, e, e >= 0 && e < i32(EXPERTS));
}

fn assign_chunk(group: u32, thread: u32) {
    for (var e = thread; e < EXPERTS; e += THREADS) {
        atomicStore(&load[e], 0);
        atomicStore(&before[e], 0);
    }
    if (thread == 0u) { atomicStore(&lost, 0); }
    workgroupBarrier();
    let last = min((group + 1u) * p.chunk, p.choices);
    if (HAS_CHUNK_COUNTS) {
        for (var at = thread; at < p.chunks * EXPERTS; at += THREADS) {
            let count = get_chunk_counts(at);
            if (count > 0) {
                atomicAdd(&load[at % EXPERTS], count);
                if (at / EXPERTS < group) { atomicAdd(&before[at % EXPERTS], count); }
            }
        }
    } else {
        for (var c = thread; c < last; c += THREADS) {
            let e = expert_of(c);
            if (e >= 0) { atomicAdd(&load[e], 1); }
        }
    }
    workgroupBarrier();
    var mine = 0;
    for (var e = thread * EACH; e < min((thread + 1u) * EACH, EXPERTS); e++) {
        mine += kept(e);
        if (LIMITED) { atomicAdd(&lost, atomicLoad(&load[e]) - kept(e)); }
    }
    let found = lower(thread, mine);
    var begin = found.x;
    for (var e = thread * EACH; e < min((thread + 1u) * EACH, EXPERTS); e++) {
        begins[e] = begin;
        if (group == 0u) { set_offsets(e, begin); }
        begin += kept(e);
    }
    if (group == 0u && thread == 0u) {
        set_offsets(EXPERTS, found.y);
        set_dropped(0u, atomicLoad(&lost));
    }
    // The slots of nobody.
    for (var s = u32(found.y) + group * THREADS + thread; s < p.slots; s += p.chunks * THREADS) { set_slot_choice(s, -1); }

    for (var begun = group * p.chunk; begun < last; begun += THREADS) {
        let c = begun + thread;
        var e = -1;
        if (c < last) { e = expert_of(c); }
        chosen[thread] = e;
        workgroupBarrier();
        var slot = -1;
        if (e >= 0) {
            var nth = atomicLoad(&before[e]);
            for (var i = 0u; i < thread; i++) { nth += select(0, 1, chosen[i] == e); }
            if (!LIMITED || nth < i32(p.capacity)) {
                slot = begins[e] + nth;
                set_slot_choice(u32(slot), i32(c));
            }
        }
        if (c < last) { set_choice_slot(c, slot); }
        workgroupBarrier();
        if (e >= 0) { atomicAdd(&before[e], 1); }
    }
}
