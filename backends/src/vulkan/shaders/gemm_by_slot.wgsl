// The products of slots, each where it belongs.

alias Terms = f32;

fn place(group: vec3<u32>, thread: u32) -> bool {
    place_slot(group, thread, group.y);
    return true;
}
fn out_at(row: u32, column: u32) -> u32 { return select(NOWHERE, slot * p.n + column, column < p.n); }
fn terms(at: u32, column: u32) -> Terms { return bias_of_expert(column); }
fn with_terms(sum: f32, terms: Terms) -> f32 {
    if (HAS_BIAS) { if (expert < p.experts) { return sum + terms; } }
    return sum;
}
fn finished(at: u32, column: u32, sum: f32) -> f32 { return with_terms(sum, terms(at, column)); }
