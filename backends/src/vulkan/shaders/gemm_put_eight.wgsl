// Eight elements of a row of a product, at a multiple of eight, are stored as 16 bytes, if they are elements. A row has a multiple of
// eight.
fn pair(at: u32, column: u32, low: f32, high: f32) -> u32 {
    return stored(finished(at, column, low)) | (stored(finished(at + 1u, column + 1u, high)) << 16u);
}
fn put_eight(row: u32, column: u32, low: vec4<f32>, high: vec4<f32>) {
    let at = out_at(row, column);
    if (at != NOWHERE) {
        c[at >> 3u] = vec4<u32>(
            pair(at, column, low.x, low.y), pair(at + 2u, column + 2u, low.z, low.w),
            pair(at + 4u, column + 4u, high.x, high.y), pair(at + 6u, column + 6u, high.z, high.w));
    }
}
