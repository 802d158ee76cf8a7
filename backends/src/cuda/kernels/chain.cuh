// What a kernel of products does with elements of its result: stores them, or gives them to the chain that is joined onto the product.
//
// JOINED: the text of `Chain` comes before (lower/joined.rs writes it), with CHAIN_PARAMETERS, which follow a kernel's own, CHAIN, which
// is made of them, and KEPT, whether something else reads the product too. A chain reads the elements as they would be in memory, rounded.

#if !JOINED
#define CHAIN_PARAMETERS
#define CHAIN Chain()
/// No chain.
struct Chain {
    template <int COUNT> struct Loaded {};
    template <int COUNT> __device__ __forceinline__ Loaded<COUNT> load(i64) const { return {}; }
};
#endif

/// Elements of the product, which lie together from `at` on, are `v`: the chain's work on them with what it loaded for them, and stored in
/// `out` if something else reads them.
template <int COUNT, typename Element>
__device__ __forceinline__ void put(Element* out, i64 at, const Vector<Element, COUNT>& v, const Chain& chain,
                                    const Chain::Loaded<COUNT>& loaded) {
#if !JOINED || KEPT
    store_vector<COUNT>(out + at, v);
#endif
#if JOINED
    chain.end<COUNT>(at, loaded, v);
#endif
}

/// The same for one element.
template <typename Element> __device__ __forceinline__ void put(Element* out, i64 at, Element v, const Chain& chain) {
    Vector<Element, 1> one;
    one.at[0] = v;
    put<1>(out, at, one, chain, chain.load<1>(at));
}
