// The statistics of all tokens from those of each workgroup of route.wgsl: one workgroup.

fn kernel(group: u32, thread: u32) {
    begin(thread);
    for (var part = thread / LANES; part < p.parts_count; part += TOKENS) {
        for (var i = 0u; i < OWN_EXPERTS; i++) {
            if (has(i)) {
                let at = part * p.experts + expert_of_lane(i);
                of_experts[i] += get_parts(2u * p.parts_count + at);
                all_of[i] += get_choices(2u * at);
                counted_of[i] += get_choices(2u * at + 1u);
            }
        }
        if (lane == 0u) {
            of_z += get_parts(2u * part);
            of_entropy += get_parts(2u * part + 1u);
        }
    }
    together_by_lanes(thread);
    end_by_lanes(thread);
}
