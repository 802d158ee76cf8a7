// Stands between a program and the real Vulkan loader, and lets what can be wrong with a device go wrong:
//
//   MOEBIUS_VULKAN_LACKS=NAME    the device lacks something: `timeline` semaphores, `halves` (floats of 16 bits), Vulkan `1.2`
//   MOEBIUS_VULKAN_FREE=BYTES    its memory, as it tells
//   MOEBIUS_VULKAN_MEMORY=BYTES  it gives so much, whatever it tells
//   MOEBIUS_VULKAN_LOST=N        it is lost at the N-th submission (from 1), and stays so
//
// Only what these need is declared here: the numbers and places are those of the Vulkan specification, for 64 bits.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

using Function = void (*)();
using Lookup = Function (*)(void*, const char*);
using Result = int32_t;

static const Result OUT_OF_DEVICE_MEMORY = -2, DEVICE_LOST = -4;
static const uint32_t VERSION_1_1 = 1u << 22 | 1u << 12;
static const uint32_t FEATURES_11 = 49, FEATURES_12 = 51, MEMORY_BUDGET = 1000237000;
// Places in lists of features.
static const int INT_16 = 41, STORAGE_16 = 0, TIMELINE = 37;

struct Header {
    uint32_t type;
    Header* next;
};
struct Flags : Header {
    uint32_t flags[64];
};
struct Properties : Header {
    uint32_t version;
};
struct Memory {
    uint32_t types;
    uint32_t type[32][2];
    uint32_t heaps;
    struct {
        uint64_t bytes;
        uint32_t flags;
    } heap[16];
};
struct Memory2 : Header {
    Memory memory;
};
struct Budget : Header {
    uint64_t budget[16];
    uint64_t usage[16];
};
struct Allocation : Header {
    uint64_t bytes;
};

static uint64_t setting(const char* name, uint64_t other) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : other;
}
static bool lacks(const char* what) {
    const char* text = getenv("MOEBIUS_VULKAN_LACKS");
    return text && !strcmp(text, what);
}

// The real functions, by name.
static Lookup instance_lookup, device_lookup;
static void (*properties2)(void*, Properties*);
static void (*features2)(void*, Flags*);
static void (*memory)(void*, Memory*);
static void (*memory2)(void*, Memory2*);
static Result (*allocate)(void*, const Allocation*, const void*, uint64_t*);
static Result (*submit)(void*, uint32_t, const void*, uint64_t);
static Result (*wait)(void*, const void*, uint64_t);
static Result (*idle)(void*);

static std::atomic<uint64_t> allocated, submitted;
static bool lost() { return submitted >= setting("MOEBIUS_VULKAN_LOST", UINT64_MAX); }

static void get_properties2(void* device, Properties* p) {
    properties2(device, p);
    if (lacks("1.2")) p->version = VERSION_1_1;
}
static void get_features2(void* device, Flags* f) {
    features2(device, f);
    if (lacks("halves")) f->flags[INT_16] = 0;
    for (Header* h = f->next; h; h = h->next) {
        if (h->type == FEATURES_11 && lacks("halves")) static_cast<Flags*>(h)->flags[STORAGE_16] = 0;
        if (h->type == FEATURES_12 && lacks("timeline")) static_cast<Flags*>(h)->flags[TIMELINE] = 0;
    }
}
static void shrink(Memory* m) {
    for (uint32_t i = 0; i < m->heaps; i++) m->heap[i].bytes = setting("MOEBIUS_VULKAN_FREE", m->heap[i].bytes);
}
static void get_memory(void* device, Memory* m) {
    memory(device, m);
    shrink(m);
}
static void get_memory2(void* device, Memory2* m) {
    memory2(device, m);
    shrink(&m->memory);
    for (Header* h = m->next; h; h = h->next) {
        if (h->type != MEMORY_BUDGET) continue;
        Budget* b = static_cast<Budget*>(h);
        for (uint32_t i = 0; i < m->memory.heaps; i++) b->budget[i] = setting("MOEBIUS_VULKAN_FREE", b->budget[i]);
    }
}
static Result allocate_memory(void* device, const Allocation* info, const void* host, uint64_t* made) {
    if (allocated + info->bytes > setting("MOEBIUS_VULKAN_MEMORY", UINT64_MAX)) return OUT_OF_DEVICE_MEMORY;
    Result result = allocate(device, info, host, made);
    if (result == 0) allocated += info->bytes;
    return result;
}
static Result queue_submit(void* queue, uint32_t count, const void* infos, uint64_t fence) {
    submitted++;
    if (!lost()) return submit(queue, count, infos, fence);
    // A device that is lost runs nothing any more: its memory may be freed.
    idle(queue);
    return DEVICE_LOST;
}
static Result queue_wait_idle(void* queue) { return lost() ? DEVICE_LOST : idle(queue); }
static Result wait_semaphores(void* device, const void* info, uint64_t timeout) {
    return lost() ? DEVICE_LOST : wait(device, info, timeout);
}

static Function device_function(void* device, const char* name);
static Function instance_function(void* instance, const char* name);

// Our function of a name; the real one is kept for it.
static Function ours(const char* name, Function real) {
    if (!real) return nullptr;
#define OURS(known, kept, function)                  \
    if (!strcmp(name, known)) {                      \
        kept = reinterpret_cast<decltype(kept)>(real); \
        return reinterpret_cast<Function>(function); \
    }
    OURS("vkGetInstanceProcAddr", instance_lookup, instance_function)
    OURS("vkGetDeviceProcAddr", device_lookup, device_function)
    OURS("vkGetPhysicalDeviceProperties2", properties2, get_properties2)
    OURS("vkGetPhysicalDeviceFeatures2", features2, get_features2)
    OURS("vkGetPhysicalDeviceMemoryProperties", memory, get_memory)
    OURS("vkGetPhysicalDeviceMemoryProperties2", memory2, get_memory2)
    OURS("vkAllocateMemory", allocate, allocate_memory)
    OURS("vkQueueSubmit", submit, queue_submit)
    OURS("vkQueueWaitIdle", idle, queue_wait_idle)
    OURS("vkWaitSemaphores", wait, wait_semaphores)
#undef OURS
    return real;
}
static Function device_function(void* device, const char* name) { return ours(name, device_lookup(device, name)); }
static Function instance_function(void* instance, const char* name) {
    return ours(name, instance_lookup(instance, name));
}

extern "C" __attribute__((visibility("default"))) Function vkGetInstanceProcAddr(void* instance, const char* name) {
    if (!instance_lookup) {
        const char* path = getenv("MOEBIUS_VULKAN_LOADER");
        void* library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
        if (!library) {
            fprintf(stderr, "MOEBIUS_VULKAN_LOADER: wanted the real loader: %s\n", path ? dlerror() : "it is not set");
            abort();
        }
        instance_lookup = reinterpret_cast<Lookup>(dlsym(library, "vkGetInstanceProcAddr"));
    }
    return instance_function(instance, name);
}
