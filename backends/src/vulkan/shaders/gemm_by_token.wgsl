// The products of the slots of tokens that have one choice each, combined: y[t] = of_rows gate[t] row[slot] + of_side side[t].

// What is asked for before the sum is there.
struct Terms {
    bias: f32,
    gate: f32,
    of_rows: f32,
    of_side: f32,
    side: f32,
}

var<private> token: u32;

fn place(group: vec3<u32>, thread: u32) -> bool {
    token = group.y;
    let found = get_choice_slot(token);
    place_slot(group, thread, select(NOWHERE, u32(found), found >= 0 && found < i32(p.slots)));
    return true;
}
fn out_at(row: u32, column: u32) -> u32 { return select(NOWHERE, token * p.n + column, column < p.n); }
fn terms(at: u32, column: u32) -> Terms {
    var terms = Terms(bias_of_expert(column), 1.0f, 1.0f, 1.0f, 0.0f);
    if (HAS_GATE) { terms.gate = get_gate(token); }
    if (HAS_COEFFICIENT) {
        terms.of_rows = get_coefficient(2u * token);
        terms.of_side = get_coefficient(2u * token + 1u);
    }
    if (HAS_SIDE) { terms.side = get_side(at); }
    return terms;
}
fn with_terms(sum: f32, terms: Terms) -> f32 {
    var v = 0.0f;
    if (slot != NOWHERE) {
        var row = sum;
        if (HAS_BIAS) { if (expert < p.experts) { row += terms.bias; } }
        v = fma(terms.gate, as_row(row), v);
    }
    if (HAS_COEFFICIENT) { v *= terms.of_rows; }
    if (HAS_SIDE) { v += terms.of_side * terms.side; }
    return v;
}
