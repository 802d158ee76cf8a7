// Stands in for libcuda.so.1: the functions of the driver that the backend uses, with the processor as the GPU. Everything on a
// stream happens at once; a recorded stream keeps its calls for later. x86-64 only.
//
// What is wrong with a GPU can be had too: MOEBIUS_EMULATED_DRIVER is the driver's version (13000), MOEBIUS_EMULATED_FREE the bytes
// that it calls free, MOEBIUS_EMULATED_MEMORY those that can really be had (16 GiB), and MOEBIUS_EMULATED_FAULT the number of the
// replayed graph (from 1) in which the GPU fails, after half of its calls and for good.
//
// The threads of a block are fibers: each runs until it waits at a barrier or ends. A barrier that not all threads reach ends
// the program with a message.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <dlfcn.h>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <unordered_map>
#include <vector>

struct Triple { unsigned x, y, z; };
struct Thread {
    Triple thread, block, block_dim, grid_dim;
    int lane, phase;
    uint64_t (*slots)[32][8];
};
struct Emulator {
    Thread* now;
    void (*block_barrier)();
    void (*warp_barrier)();
};

static const int MOST_THREADS = 1024;
// Not a multiple of a power of two: else the same place in all stacks would share one set of the caches.
static const size_t STACK = (128 << 10) + 832;

extern "C" void switch_stack(void** save, void* to);
asm(R"(
.text
.globl switch_stack
switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Fiber { void* stack; State state; Thread thread; };
static Fiber fibers[MOST_THREADS];
static uint64_t slots[MOST_THREADS / 32][2][32][8];
static void* scheduler;
static Fiber* current;
static void (*entry)(void**);
static void** parameters;
static Emulator emulator;
static std::mutex one_launch;

static void leave(State state) {
    current->state = state;
    switch_stack(&current->stack, scheduler);
}
static void block_barrier() { leave(AT_BLOCK); }
static void warp_barrier() { leave(AT_WARP); }
static void run_fiber() {
    entry(parameters);
    leave(DONE);
    abort();
}
static void stuck(const char* kernel, const char* why) {
    fprintf(stderr, "emulated GPU: kernel %s: %s\n", kernel, why);
    abort();
}

static void run_block(const char* kernel, Triple block, Triple grid, unsigned threads) {
    static char* stacks = (char*)mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        // A function starts with its stack 8 bytes off a multiple of 16.
        void** top = (void**)(stacks + STACK * (i + 1)) - 3;
        *--top = (void*)run_fiber;
        top -= 6;
        memset(top, 0, 48);
        f.stack = top, f.state = READY;
        f.thread = {{i, 0, 0}, block, {threads, 1, 1}, grid, (int)(i % 32), 0, slots[i / 32]};
    }
    unsigned done = 0;
    // Odd blocks run their threads backwards: no order may matter.
    bool backwards = block.x % 2;
    while (done < threads) {
        bool moved = false;
        for (unsigned n = 0; n < threads; n++) {
            Fiber& f = fibers[backwards ? threads - 1 - n : n];
            if (f.state != READY) continue;
            moved = true;
            current = &f;
            emulator.now = &f.thread;
            switch_stack(&scheduler, f.stack);
            done += f.state == DONE;
        }
        for (unsigned w = 0; w * 32 < threads; w++) {
            unsigned waiting = 0, gone = 0;
            for (unsigned i = w * 32; i < w * 32 + 32; i++) waiting += fibers[i].state == AT_WARP, gone += fibers[i].state == DONE;
            if (waiting && waiting + gone == 32 && gone) stuck(kernel, "a warp waits for threads that have ended");
            if (waiting < 32) continue;
            for (unsigned i = w * 32; i < w * 32 + 32; i++) fibers[i].state = READY;
            moved = true;
        }
        unsigned waiting = 0;
        for (unsigned i = 0; i < threads; i++) waiting += fibers[i].state == AT_BLOCK;
        if (waiting && waiting + done == threads) {
            for (unsigned i = 0; i < threads; i++)
                if (fibers[i].state == AT_BLOCK) fibers[i].state = READY;
            moved = true;
        }
        if (!moved && done < threads) stuck(kernel, "threads wait at different barriers");
    }
}

struct Module { void* library; };
struct Function { std::string name; void (*call)(void**); std::vector<size_t> sizes; };
struct Graph { std::vector<std::function<void()>> calls; };
struct Event { std::chrono::steady_clock::time_point at; };
static Graph* recording;

static size_t setting(const char* name, size_t other) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : other;
}
static const size_t MEMORY = (size_t)16 << 30;
static size_t taken;
static std::unordered_map<uint64_t, size_t> allocated;
static std::mutex allocating;
static size_t replays;
// CUDA_ERROR_LAUNCH_FAILED, once the GPU has failed.
static int failed;

static int later(std::function<void()> call) {
    if (failed) return failed;
    if (recording) recording->calls.push_back(call);
    else call();
    return 0;
}

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* v) { *v = (int)setting("MOEBIUS_EMULATED_DRIVER", 13000); return 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDeviceGet(int* d, int) { *d = 0; return 0; }
int cuDeviceGetName(char* to, int n, int) { snprintf(to, n, "emulated GPU"); return 0; }
int cuDeviceGetAttribute(int* to, int which, int) { *to = which == 75 ? 8 : 0; return 0; }
int cuDeviceTotalMem_v2(size_t* n, int) { *n = MEMORY; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int) { *c = (void*)1; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuStreamCreateWithPriority(void** s, unsigned, int) { *s = (void*)1; return 0; }
int cuStreamDestroy_v2(void*) { return 0; }
int cuStreamSynchronize(void*) {
    // As the driver does.
    return recording ? 900 : failed;
}
int cuStreamBeginCapture_v2(void*, int) { recording = new Graph; return 0; }
int cuStreamEndCapture(void*, void** g) { *g = recording; recording = nullptr; return 0; }
int cuGraphInstantiateWithFlags(void** e, void* g, unsigned long long) { *e = new Graph(*(Graph*)g); return 0; }
int cuGraphDestroy(void* g) { delete (Graph*)g; return 0; }
int cuGraphExecDestroy(void* g) { delete (Graph*)g; return 0; }
int cuGraphLaunch(void* g, void*) {
    if (failed) return failed;
    auto& calls = ((Graph*)g)->calls;
    bool fails = ++replays == setting("MOEBIUS_EMULATED_FAULT", 0);
    for (size_t i = 0; i < (fails ? calls.size() / 2 : calls.size()); i++) calls[i]();
    // Told by the next call that waits: a launch alone never knows.
    if (fails) failed = 719;
    return 0;
}
int cuMemAlloc_v2(uint64_t* p, size_t n) {
    if (failed) return failed;
    std::lock_guard<std::mutex> lock(allocating);
    // More than is there: as on a small GPU.
    size_t all = setting("MOEBIUS_EMULATED_MEMORY", MEMORY);
    if (n > all || taken > all - n) return 2;
    void* at = aligned_alloc(256, (n + 255) / 256 * 256);
    if (!at) return 2;
    memset(at, 0xff, n);
    *p = (uint64_t)at;
    allocated[*p] = n;
    taken += n;
    return 0;
}
int cuMemFree_v2(uint64_t p) {
    std::lock_guard<std::mutex> lock(allocating);
    taken -= allocated[p];
    allocated.erase(p);
    free((void*)p);
    return 0;
}
int cuMemAllocHost_v2(void** p, size_t n) { *p = malloc(n); return *p ? 0 : 2; }
int cuMemFreeHost(void* p) { free(p); return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* all) {
    *free = setting("MOEBIUS_EMULATED_FREE", MEMORY), *all = MEMORY;
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, void*) { return later([=] { memcpy((void*)to, from, n); }); }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, void*) { return later([=] { memcpy(to, (void*)from, n); }); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void*) { return later([=] { memmove((void*)to, (void*)from, n); }); }
int cuMemsetD8Async(uint64_t to, unsigned char v, size_t n, void*) { return later([=] { memset((void*)to, v, n); }); }
int cuModuleLoadDataEx(void** m, const void* image, unsigned, void*, void*) {
    uint64_t size;
    memcpy(&size, image, 8);
    char name[] = "/tmp/moebius-module-XXXXXX";
    int handle = mkstemp(name);
    if (write(handle, (const char*)image + 8, size) != (ssize_t)size) return 200;
    close(handle);
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    unlink(name);
    if (!library) { fprintf(stderr, "emulated GPU: %s\n", dlerror()); return 200; }
    emulator.block_barrier = block_barrier, emulator.warp_barrier = warp_barrier;
    *(Emulator**)dlsym(library, "moebius_emulator") = &emulator;
    *m = new Module{library};
    return 0;
}
int cuModuleUnload(void* m) { dlclose(((Module*)m)->library); delete (Module*)m; return 0; }
int cuModuleGetFunction(void** f, void* m, const char* name) {
    std::string n = name;
    void* library = ((Module*)m)->library;
    auto call = (void (*)(void**))dlsym(library, (n + "__call").c_str());
    auto sizes = (void (*)(size_t*))dlsym(library, (n + "__sizes").c_str());
    if (!call || !sizes) return 500;
    size_t all[64];
    sizes(all);
    Function* made = new Function{n, call, {}};
    for (size_t* s = all; *s; s++) made->sizes.push_back(*s);
    *f = made;
    return 0;
}
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned, unsigned, unsigned, void*, void** p, void**) {
    Function* function = (Function*)f;
    if (!x || !y || !z || y > 65535 || z > 65535 || bx > MOST_THREADS || bx % 32) return 1;
    // Arguments at 16 bytes each, as the values themselves may be gone when a recording is replayed.
    std::vector<std::vector<unsigned char>> values;
    for (size_t i = 0; i < function->sizes.size(); i++)
        values.emplace_back((unsigned char*)p[i], (unsigned char*)p[i] + function->sizes[i]);
    return later([=] {
        std::lock_guard<std::mutex> lock(one_launch);
        std::vector<void*> pointers;
        for (auto& v : values) pointers.push_back((void*)v.data());
        entry = function->call, parameters = pointers.data();
        for (unsigned k = 0; k < z; k++)
            for (unsigned j = 0; j < y; j++)
                for (unsigned i = 0; i < x; i++) run_block(function->name.c_str(), {i, j, k}, {x, y, z}, bx);
    });
}
int cuEventCreate(void** e, unsigned) { *e = new Event; return 0; }
int cuEventDestroy_v2(void* e) { delete (Event*)e; return 0; }
int cuEventRecord(void* e, void*) { ((Event*)e)->at = std::chrono::steady_clock::now(); return 0; }
int cuEventSynchronize(void*) { return 0; }
int cuEventQuery(void*) { return 0; }
int cuEventElapsedTime(float* ms, void* a, void* b) {
    *ms = std::chrono::duration<float, std::milli>(((Event*)b)->at - ((Event*)a)->at).count();
    return 0;
}
int cuGetErrorName(int code, const char** to) {
    *to = code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_EMULATED";
    return 0;
}
int cuGetErrorString(int, const char** to) { *to = "an error of the emulated GPU"; return 0; }
}
