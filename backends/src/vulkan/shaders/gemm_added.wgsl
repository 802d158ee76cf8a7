// What is added to an element of a product and what its chain reads beside it, asked for before the sum is there: it need not be waited
// for behind it.

struct Added {
    terms: Terms,
    beside: Beside,
}
fn added_to(at: u32, column: u32) -> Added { return Added(terms(at, column), beside(at)); }
fn leave_added(at: u32, sum: f32, added: Added) { leave_beside(at, with_terms(sum, added.terms), added.beside); }
