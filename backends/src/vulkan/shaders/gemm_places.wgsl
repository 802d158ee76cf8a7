// What a kernel of products says of the tile of a workgroup, TILE_ROWS x TILE_COLUMNS: `place(group, thread)` finds it, sets these, and is
// false if there is none; `left_at(row, k)` and `right_at(k, column)` are where elements lie in a and b, NOWHERE outside of the matrices,
// where they are 0, and `left_step()` and `right_step()` how far from those the elements of the next k lie; `out_at(row, column)` is where
// an element belongs in c, NOWHERE if it is none, and `finished(at, column, sum)` what is stored there. Where few rows are multiplied,
// `terms(at, column)` are what is added to the sum, and `with_terms(sum, terms)` does it.

const NOWHERE: u32 = 0xffffffffu;
var<private> row0: u32;
var<private> column0: u32;
// Length of the sums.
var<private> depth: u32;
