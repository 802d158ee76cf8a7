// Philox4x32-10, as ir/src/philox.rs.

// High and low word of a product.
fn product(a: u32, b: u32) -> vec2<u32> {
    let a0 = a & 0xffffu;
    let a1 = a >> 16u;
    let b0 = b & 0xffffu;
    let b1 = b >> 16u;
    let middle = a1 * b0 + (a0 * b0 >> 16u);
    let other = a0 * b1 + (middle & 0xffffu);
    return vec2<u32>(a1 * b1 + (middle >> 16u) + (other >> 16u), a * b);
}

// The block of this number; `upper` are the two upper words of the counter.
fn philox(key: vec2<u32>, block: u32, upper: vec2<u32>) -> vec4<u32> {
    var c = vec4<u32>(block, 0u, upper);
    var k = key;
    for (var round = 0u; round < 10u; round++) {
        let p0 = product(c.x, 0xd2511f53u);
        let p1 = product(c.z, 0xcd9e8d57u);
        c = vec4<u32>(p1.x ^ c.y ^ k.x, p1.y, p0.x ^ c.w ^ k.y, p0.y);
        k = k + vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    return c;
}
