// c = a b + bias + add, for each product of a batch; `add` is f32 of the same shape, and may be c. Strides are in elements; c is
// row-major. Where k is cut into PARTS, c has the sums of each part, of `total` elements one after another.

// The bias and what is added.
alias Terms = vec2<f32>;

var<private> a_first: u32;
var<private> b_first: u32;
var<private> c_first: u32;

fn place(group: vec3<u32>, thread: u32) -> bool {
    let batch = group.z / PARTS;
    let part = group.z % PARTS;
    let k0 = part * p.part;
    a_first = batch * p.a_batch + k0 * p.a_column;
    b_first = p.b_at + batch * p.b_batch + k0 * p.b_row;
    c_first = part * p.total + batch * p.c_batch;
    row0 = group.y * TILE_ROWS;
    column0 = group.x * TILE_COLUMNS;
    depth = min(p.part, p.k - k0);
    return true;
}
fn left_at(row: u32, k: u32) -> u32 {
    return select(NOWHERE, a_first + row * p.a_row + k * p.a_column, row < p.m && k < depth);
}
fn right_at(k: u32, column: u32) -> u32 {
    return select(NOWHERE, b_first + k * p.b_row + column * p.b_column, k < depth && column < p.n);
}
fn left_step() -> u32 { return p.a_column; }
fn right_step() -> u32 { return p.b_row; }
fn out_at(row: u32, column: u32) -> u32 {
    return select(NOWHERE, p.c_at + c_first + row * p.n + column, row < p.m && column < p.n);
}
fn terms(at: u32, column: u32) -> Terms { return Terms(get_bias(column), get_add(at - p.c_at)); }
fn with_terms(sum: f32, terms: Terms) -> f32 {
    var v = sum;
    if (HAS_BIAS) { v += terms.x; }
    if (HAS_ADD) { v += terms.y; }
    return v;
}
fn finished(at: u32, column: u32, sum: f32) -> f32 { return with_terms(sum, terms(at, column)); }
