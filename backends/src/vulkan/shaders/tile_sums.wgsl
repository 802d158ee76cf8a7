// Of a tile of logits in a workgroup's memory: the largest of a row and the sum of exponentials of what is less, 0 of nothing but
// -inf.

const ACROSS: u32 = TILE + 1u;
const LOGITS: u32 = TILE * ACROSS;

var<workgroup> student: array<f32, LOGITS>;
var<workgroup> teacher: array<f32, LOGITS>;

fn put_sums(to: u32, all: u32, greatest: f32, total: f32) {
    set_parts(to, greatest);
    set_parts(to + all, total);
}

// Of the student's row of this thread, times `scale`.
fn student_sums(to: u32, all: u32, row: u32, scale: f32) {
    var greatest = -inf();
    for (var c = 0u; c < TILE; c++) { greatest = max_nan(greatest, student[row * ACROSS + c] * scale); }
    let shift = select(greatest, 0.0f, greatest == -inf());
    var total = 0.0f;
    for (var c = 0u; c < TILE; c++) { total += e_to(student[row * ACROSS + c] * scale - shift); }
    put_sums(to, all, greatest, total);
}
