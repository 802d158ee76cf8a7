// What a kernel of products says of the tile of a workgroup: `place(group, thread)` finds it, sets these, and is false if there is none;
// `left_at(row, k)` and `right_at(k, column)` are where elements lie in a and b, NOWHERE outside of the matrices, where they are 0;
// `put(row, column, sum)` stores an element, if it is one.

const NOWHERE: u32 = 0xffffffffu;
var<private> row0: u32;
var<private> column0: u32;
// Length of the sums.
var<private> depth: u32;
