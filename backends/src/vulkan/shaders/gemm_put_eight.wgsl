// Eight elements of a row of a product, at a multiple of eight, leave together, if they are elements. A row has a multiple of eight.
fn put_eight(row: u32, column: u32, low: vec4<f32>, high: vec4<f32>) {
    let at = out_at(row, column);
    if (at != NOWHERE) {
        leave_eight(at,
            vec4<f32>(finished(at, column, low.x), finished(at + 1u, column + 1u, low.y),
                finished(at + 2u, column + 2u, low.z), finished(at + 3u, column + 3u, low.w)),
            vec4<f32>(finished(at + 4u, column + 4u, high.x), finished(at + 5u, column + 5u, high.y),
                finished(at + 6u, column + 6u, high.z), finished(at + 7u, column + 7u, high.w)));
    }
}
