// An element of a product leaves, if it is one.
fn put(row: u32, column: u32, sum: f32) {
    let at = out_at(row, column);
    if (at != NOWHERE) { leave(at, finished(at, column, sum)); }
}
