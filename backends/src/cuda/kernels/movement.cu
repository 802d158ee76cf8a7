// Copies between strided views: transpose, broadcast, slice, pad, concat. U is an unsigned integer as wide as an element.

/// The most axes of a view.
#define MOST_AXES 8

/// Two views of one shape, in elements.
struct Views {
    i64 shape[MOST_AXES], from[MOST_AXES], to[MOST_AXES];
    i64 from_at, to_at, elements;
    i64 axes;
};

/// One thread moves one element; neighbours in the last axis belong to neighbouring threads.
template <typename Index> __device__ void move_element(const U* from, U* to, const Views& v, Index i) {
    i64 read = v.from_at, write = v.to_at;
    for (int axis = (int)v.axes - 1; axis >= 0; axis--) {
        Index extent = (Index)v.shape[axis], at = i % extent;
        i /= extent;
        read += (i64)at * v.from[axis];
        write += (i64)at * v.to[axis];
    }
    to[write] = from[read];
}

KERNEL move_views(const U* from, U* to, Views v) {
    begin();
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= v.elements) return;
    // Division of 32-bit numbers is many times faster.
    if (v.elements <= 0x7fffffff) move_element<u32>(from, to, v, (u32)i);
    else move_element<u64>(from, to, v, (u64)i);
}
