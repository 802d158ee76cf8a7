// Attention of new tokens over caches [batch, room, kv_heads HEAD]: where a workgroup, for a token of the batch and a head, finds what it
// reads.

// Elements from a key to the next, and how many are visible, the token's own included.
var<private> width: u32;
var<private> visible: u32;
// Where the head's query, its first key and value in the caches, and the token's own key begin; its value is `width` behind that.
var<private> of_query: u32;
var<private> of_cache: u32;
var<private> of_fresh: u32;

fn place(group: u32) {
    let h = group % p.heads;
    let row = group / p.heads;
    let shared_by = p.heads / p.kv_heads;
    width = p.kv_heads * HEAD;
    visible = u32(clamp(get_start(0u), 0, i32(p.room - p.tokens))) + row % p.tokens + 1u;
    of_query = (row * (p.heads + 2u * p.kv_heads) + h) * HEAD;
    of_cache = row / p.tokens * p.room * width + h / shared_by * HEAD;
    of_fresh = (row * (p.heads + 2u * p.kv_heads) + p.heads + h / shared_by) * HEAD;
}
