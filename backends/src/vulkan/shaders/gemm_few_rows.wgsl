// The tile of a workgroup where there are few rows, so that reading b is the work: TILE_COLUMNS columns, whose sums SLICES threads each share. An
// element of b is read once, for all ROWS rows of a.

const ROOM: u32 = ROWS * THREADS;
// Sums are made of parts of so many products: one long sum would lose digits.
const PRODUCTS_OF_A_PART: u32 = 64u;

var<workgroup> room: array<f32, ROOM>;

fn kernel(group: vec3<u32>, thread: u32) {
    if (!place(group, thread)) { return; }
    // Neighbouring threads read what lies together.
    let mine = select(thread % TILE_COLUMNS, thread / SLICES, RIGHT_ALONG_K);
    let slice = select(thread / TILE_COLUMNS, thread % SLICES, RIGHT_ALONG_K);
    var sums: array<f32, ROWS>;
    var part: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        sums[r] = 0.0f;
        part[r] = 0.0f;
    }
    var products = 0u;
    for (var k = slice; k < depth; k += SLICES) {
        let at = right_at(k, column0 + mine);
        if (at != NOWHERE) {
            let y = get_b(at);
            for (var r = 0u; r < ROWS; r++) {
                let x_at = left_at(row0 + r, k);
                if (x_at != NOWHERE) { part[r] = fma(get_a(x_at), y, part[r]); }
            }
        }
        products++;
        if (products % PRODUCTS_OF_A_PART == 0u) {
            for (var r = 0u; r < ROWS; r++) {
                sums[r] += part[r];
                part[r] = 0.0f;
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) { room[(r * SLICES + slice) * TILE_COLUMNS + mine] = sums[r] + part[r]; }
    workgroupBarrier();
    for (var e = thread; e < ROWS * TILE_COLUMNS; e += THREADS) {
        let r = e / TILE_COLUMNS;
        var sum = 0.0f;
        for (var s = 0u; s < SLICES; s++) { sum += room[(r * SLICES + s) * TILE_COLUMNS + e % TILE_COLUMNS]; }
        put(row0 + r, column0 + e % TILE_COLUMNS, sum);
    }
}
