// Sums over lanes of 32 threads, of which ACROSS side by side, a power of 2, have eight columns each and the others more of the same columns.
// Where lanes have several sums, each gives half of them away and goes on with the others: eight sums over all lanes take nine exchanges.

var<workgroup> folded: array<f32, FOLDED>;

// Puts the sums of the 8 ACROSS columns behind `base` of `folded`. A thread has columns 0, 2, 4, 6 of its eight in `even` and 1, 3, 5, 7 in
// `odd`. Nobody waits until they are there.
fn fold_into(thread: u32, base: u32, even: vec4<f32>, odd: vec4<f32>) {
    var at = base + thread % ACROSS * 8u;
    if (ACROSS == 32u) {
        for (var i = 0u; i < 4u; i++) {
            folded[at + 2u * i] = even[i];
            folded[at + 2u * i + 1u] = odd[i];
        }
        return;
    }
    let high = (thread & 16u) != 0u;
    let four = select(even, odd, high) + other_four(thread, select(odd, even, high), 16u);
    at += select(0u, 1u, high);
    if (ACROSS == 16u) {
        for (var i = 0u; i < 4u; i++) { folded[at + 2u * i] = four[i]; }
        return;
    }
    let middle = (thread & 8u) != 0u;
    let two = select(four.xy, four.zw, middle) + other_two(thread, select(four.zw, four.xy, middle), 8u);
    at += select(0u, 4u, middle);
    if (ACROSS == 8u) {
        folded[at] = two.x;
        folded[at + 2u] = two.y;
        return;
    }
    let low = (thread & 4u) != 0u;
    var one = select(two.x, two.y, low) + other_one(thread, select(two.y, two.x, low), 4u);
    at += select(0u, 2u, low);
    if (ACROSS < 4u) { one += other_one(thread, one, 2u); }
    if (ACROSS < 2u) { one += other_one(thread, one, 1u); }
    // Of lanes that have the same sum, one.
    if (thread % 4u < ACROSS) { folded[at] = one; }
}
