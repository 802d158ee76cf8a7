// Kernels that work on many tensors: each block finds its task in a table. A file defines its own struct Task, whose first field is
// `i64 first`, the first block of the task.

/// The task of this block.
template <typename Task> __device__ __forceinline__ const Task& task_of_block(const Task* tasks, int count) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        int middle = (low + high) / 2;
        if (tasks[middle].first <= blockIdx.x) low = middle;
        else high = middle;
    }
    return tasks[low];
}
