// The statistics of all tokens, from what each thread has of some: of its lane's experts the sums of probabilities and the choices, all
// and counted ones; and, in the first lane, the sums of lse squared and of the entropy.

var<private> of_experts: array<f32, OWN_EXPERTS>;
var<private> all_of: array<i32, OWN_EXPERTS>;
var<private> counted_of: array<i32, OWN_EXPERTS>;
var<private> of_z: f32;
var<private> of_entropy: f32;

fn together_by_lanes(thread: u32) {
    if (p.tokens < 2u) { return; }
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        of_experts[i] = tokens_sum_of_lanes(thread, of_experts[i]);
        all_of[i] = tokens_count_of_lanes(thread, all_of[i]);
        counted_of[i] = tokens_count_of_lanes(thread, counted_of[i]);
    }
    of_z = tokens_sum_of_lanes(thread, of_z);
    of_entropy = tokens_sum_of_lanes(thread, of_entropy);
}

fn end_by_lanes(thread: u32) {
    let n = f32(p.tokens);
    var loss = 0.0f;
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        // Without tokens there is no loss.
        if (has(i) && p.tokens > 0u) { loss += (of_experts[i] / n) * (f32(counted_of[i]) / (n * f32(p.counted))); }
        if (has(i) && thread < LANES) { set_counts(expert_of_lane(i), all_of[i]); }
    }
    loss = lanes_sum(thread, loss);
    if (thread == 0u) {
        set_balance(0u, f32(p.experts) * loss);
        set_z(0u, select(0.0f, of_z / n, p.tokens > 0u));
        set_entropy(0u, select(0.0f, of_entropy / n, p.tokens > 0u));
    }
}
