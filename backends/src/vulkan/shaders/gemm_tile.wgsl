// One tile of a matrix product: a workgroup computes TILE x TILE_WIDTH elements of A B, of which every thread has OWN x OWN_WIDTH. A
// kernel says what `left(row, k)` and `right(k, column)` are, 0 outside of the matrices.
//
// The order of a sum depends on its length alone. LEFT_ALONG_K, RIGHT_ALONG_K: neighbours along k lie together in memory.

const DEPTH: u32 = 16u;
// Sums are made of parts of so many blocks of DEPTH: one long sum would lose digits.
const BLOCKS_OF_A_PART: u32 = 4u;
const OWN: u32 = TILE / 16u;
const OWN_WIDTH: u32 = TILE_WIDTH / 16u;
const SUMS: u32 = OWN * OWN_WIDTH;
// Rows lie in different banks.
const PITCH: u32 = TILE + 1u;
const PITCH_WIDTH: u32 = TILE_WIDTH + 1u;
const ROOM: u32 = DEPTH * PITCH;
const ROOM_WIDTH: u32 = DEPTH * PITCH_WIDTH;

var<workgroup> left_room: array<f32, ROOM>;
var<workgroup> right_room: array<f32, ROOM_WIDTH>;
// Of the thread's rows and columns; see `row_of` and `column_of`.
var<private> sums: array<f32, SUMS>;

// The row of the tile, and the column, that the thread's i-th ones are.
fn row_of(thread: u32, i: u32) -> u32 { return i * 16u + thread / 16u; }
fn column_of(thread: u32, i: u32) -> u32 { return i * 16u + thread % 16u; }

fn gemm_tile(thread: u32, row0: u32, column0: u32, k: u32) {
    var part: array<f32, SUMS>;
    for (var i = 0u; i < SUMS; i++) {
        sums[i] = 0.0f;
        part[i] = 0.0f;
    }
    var block = 0u;
    for (var k0 = 0u; k0 < k; k0 += DEPTH) {
        for (var i = thread; i < TILE * DEPTH; i += THREADS) {
            let r = select(i % TILE, i / DEPTH, LEFT_ALONG_K);
            let c = select(i / TILE, i % DEPTH, LEFT_ALONG_K);
            left_room[c * PITCH + r] = left(row0 + r, k0 + c);
        }
        for (var i = thread; i < TILE_WIDTH * DEPTH; i += THREADS) {
            let r = select(i % TILE_WIDTH, i / DEPTH, RIGHT_ALONG_K);
            let c = select(i / TILE_WIDTH, i % DEPTH, RIGHT_ALONG_K);
            right_room[c * PITCH_WIDTH + r] = right(k0 + c, column0 + r);
        }
        workgroupBarrier();
        for (var c = 0u; c < DEPTH; c++) {
            var y: array<f32, OWN_WIDTH>;
            for (var j = 0u; j < OWN_WIDTH; j++) { y[j] = right_room[c * PITCH_WIDTH + column_of(thread, j)]; }
            for (var i = 0u; i < OWN; i++) {
                let x = left_room[c * PITCH + row_of(thread, i)];
                for (var j = 0u; j < OWN_WIDTH; j++) {
                    part[i * OWN_WIDTH + j] = fma(x, y[j], part[i * OWN_WIDTH + j]);
                }
            }
        }
        workgroupBarrier();
        block++;
        if (block % BLOCKS_OF_A_PART == 0u) {
            for (var i = 0u; i < SUMS; i++) {
                sums[i] += part[i];
                part[i] = 0.0f;
            }
        }
    }
    for (var i = 0u; i < SUMS; i++) { sums[i] += part[i]; }
}
