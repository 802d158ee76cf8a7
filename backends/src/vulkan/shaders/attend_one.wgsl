// What attention of one new token of each sequence does beside: the first of the heads that share the new key and value puts them into the
// caches.

fn keep(group: u32, thread: u32, newest: u32, own_key: Eight, own_value: Eight) {
    if (group == 0u && thread == 0u && i32(newest) != get_start(0u)) { reject(get_start(0u)); }
    if (group % p.heads % (p.heads / p.kv_heads) == 0u && thread < HEAD / 8u) {
        let to = of_cache + newest * width + thread * 8u;
        set_eight_k_cache(to, own_key);
        set_eight_v_cache(to, own_value);
    }
}
