// The choice of the first token, which has one alone, for every thread, where routing goes by softmax and nothing else: the largest logit,
// unless another is so near that rounding may make the quotients equal, of which the lowest is taken. e^-TOO_NEAR differs from 1 by 80 times
// what rounding does.

const TOO_NEAR: f32 = 1e-5f;
// More than any number of an expert; sums of as many as there are experts are exact.
const ONE_NEAR: f32 = 4096.0f;

fn choice_of_first(thread: u32) -> i32 {
    begin(thread);
    look_for_greatest_by_lanes(thread, 0u);
    // Without a finite one, what routing takes.
    if (!is_finite(greatest)) { return 0; }
    var near = 0.0f;
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (has(i) && own[i] >= greatest - TOO_NEAR) { near += ONE_NEAR + f32(expert_of_lane(i)); }
    }
    near = lanes_sum(thread, near);
    if (near < 2.0f * ONE_NEAR) { return i32(near - ONE_NEAR); }
    weigh_by_lanes(thread);
    var best = -inf();
    var at = p.experts;
    for (var i = 0u; i < OWN_EXPERTS; i++) {
        if (has(i) && own_softmax(i) > best) {
            best = own_softmax(i);
            at = expert_of_lane(i);
        }
    }
    return i32(best_of_lanes(thread, best, at));
}
