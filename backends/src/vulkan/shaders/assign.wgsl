// Slots for the chosen experts, of which none keeps more than `capacity`, and not the first ones in their order: a workgroup for each
// expert. Every workgroup counts the choices of all experts and so knows where its own segment begins. Then it goes through the choices
// in order and gives each of its own that stays the next slot.
//
// index [choices]; `kept` is scratch: whether a choice stays, where not all do.

var<workgroup> load: array<atomic<i32>, MOST_EXPERTS>;
var<workgroup> scan: array<i32, THREADS>;
var<workgroup> begin: i32;
var<workgroup> all_kept: i32;
var<workgroup> lost: i32;

// What lower threads have, and what all have.
fn before(thread: u32, own: i32) -> vec2<i32> {
    scan[thread] = own;
    workgroupBarrier();
    for (var step = 1u; step < THREADS; step *= 2u) {
        var lower = 0;
        if (thread >= step) { lower = scan[thread - step]; }
        workgroupBarrier();
        scan[thread] += lower;
        workgroupBarrier();
    }
    let found = vec2<i32>(scan[thread] - own, scan[THREADS - 1u]);
    workgroupBarrier();
    return found;
}

// Choice c comes before choice d where their priorities are equal. Choice-major: all first choices before all second ones.
fn earlier(c: u32, d: u32) -> bool {
    if (!CHOICE_MAJOR) { return c < d; }
    return c % p.k * p.n + c / p.k < d % p.k * p.n + d / p.k;
}
// A NaN comes last.
fn urgency(c: u32) -> f32 {
    let u = get_priority(c);
    return select(u, -inf(), is_nan(u));
}

fn kernel(group: u32, thread: u32) {
    let me = i32(group);
    let choices = p.n * p.k;
    for (var e = thread; e < p.experts; e += THREADS) { atomicStore(&load[e], 0); }
    workgroupBarrier();
    for (var c = thread; c < choices; c += THREADS) {
        let e = get_index(c);
        if (e >= 0 && e < i32(p.experts)) { atomicAdd(&load[e], 1); }
    }
    workgroupBarrier();
    if (thread == 0u) {
        begin = 0;
        all_kept = 0;
        lost = 0;
        for (var e = 0u; e < p.experts; e++) {
            let here = atomicLoad(&load[e]);
            let keep = min(here, i32(p.capacity));
            if (e < group) { begin += keep; }
            all_kept += keep;
            lost += here - keep;
        }
    }
    workgroupBarrier();
    let full = atomicLoad(&load[group]) > i32(p.capacity);

    if (full && HAS_PRIORITY) {
        for (var c = thread; c < choices; c += THREADS) {
            if (get_index(c) != me) { continue; }
            let u = urgency(c);
            var better = 0u;
            for (var d = 0u; d < choices; d++) {
                if (get_index(d) != me) { continue; }
                let v = urgency(d);
                if (v > u || (v == u && earlier(d, c))) { better++; }
            }
            set_kept(c, u32(better < p.capacity));
        }
    } else if (full) {
        var done = 0;
        for (var first = 0u; first < choices; first += THREADS) {
            let at = first + thread;
            // The choice that is `at`-th in the order.
            var c = at;
            if (CHOICE_MAJOR) { c = at % p.n * p.k + at / p.n; }
            var own = 0;
            if (at < choices && get_index(min(c, choices - 1u)) == me) { own = 1; }
            let found = before(thread, own);
            if (own == 1) { set_kept(c, u32(done + found.x < i32(p.capacity))); }
            done += found.y;
        }
    }
    storageBarrier();
    workgroupBarrier();

    var done = begin;
    for (var first = 0u; first < choices; first += THREADS) {
        let c = first + thread;
        var e = -1;
        if (c < choices) { e = get_index(c); }
        var stays = 0;
        if (e == me) {
            stays = 1;
            if (full) { stays = i32(get_kept(c)); }
        }
        let found = before(thread, stays);
        if (stays == 1) { set_slot_choice(u32(done + found.x), i32(c)); }
        if (e == me) {
            set_choice_slot(c, select(-1, done + found.x, stays == 1));
        } else if (group == 0u && c < choices && (e < 0 || e >= i32(p.experts))) {
            // What goes nowhere is nobody's; the first workgroup takes it.
            set_choice_slot(c, -1);
        }
        done += found.y;
    }
    if (thread == 0u) {
        set_offsets(group, begin);
        if (group == 0u) {
            set_offsets(p.experts, all_kept);
            set_dropped(0u, lost);
        }
    }
    if (group == 0u) {
        for (var s = u32(all_kept) + thread; s < p.slots; s += THREADS) { set_slot_choice(s, -1); }
    }
}
