// Stands in for libnvrtc.so.13: "compiles" a kernel's text with g++ against kernel.h. The machine code is a shared library
// behind its length.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <regex>
#include <sstream>
#include <string>
#include <unistd.h>

struct Program { std::string source, log, code; };

static std::string path() {
    Dl_info info;
    dladdr((void*)&path, &info);
    return info.dli_fname;
}
static std::string folder() { return path().substr(0, path().rfind('/')); }
static std::string content(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

extern "C" {
int nvrtcVersion(int* major, int* minor) {
    // That of its name, so that a copy can be an older one.
    *major = atoi(path().substr(path().rfind('.') + 1).c_str()), *minor = 0;
    return 0;
}
const char* nvrtcGetErrorString(int) { return "error of the emulated NVRTC"; }
int nvrtcCreateProgram(Program** p, const char* source, const char*, int, const char**, const char**) {
    *p = new Program{source, "", ""};
    return 0;
}
int nvrtcCompileProgram(Program* p, int, const char**) {
    char name[] = "/tmp/moebius-kernel-XXXXXX";
    int handle = mkstemp(name);
    close(handle);
    std::string base = name, text = p->source;
    std::regex kernel("KERNEL\\s+(?:__launch_bounds__\\([^)]*\\)\\s*)?(\\w+)\\s*\\(");
    for (std::sregex_iterator i(p->source.begin(), p->source.end(), kernel), end; i != end; ++i) {
        std::string k = (*i)[1];
        text += "extern \"C\" void " + k + "__call(void** p) { emulated_call(" + k + ", p); }\n";
        text += "extern \"C\" void " + k + "__sizes(size_t* s) { emulated_sizes(" + k + ", s); }\n";
    }
    std::ofstream(base + ".cpp") << text;
    // Products and sums are not joined: fmaf is written where it is meant. Shared memory of a template is each module's own.
    std::string command = "g++ -std=c++17 -O1 -w -fPIC -shared -Bsymbolic -fno-gnu-unique -ffp-contract=off -include " + folder() +
                          "/kernel.h " + base + ".cpp -o " + base + ".so 2> " + base + ".log";
    int result = system(command.c_str());
    p->log = content(base + ".log");
    if (result == 0) {
        std::string library = content(base + ".so");
        uint64_t size = library.size();
        p->code = std::string((char*)&size, 8) + library;
    }
    for (const char* end : {"", ".cpp", ".so", ".log"}) unlink((base + end).c_str());
    return result == 0 ? 0 : 6;
}
int nvrtcDestroyProgram(Program** p) { delete *p; *p = nullptr; return 0; }
int nvrtcGetProgramLogSize(Program* p, size_t* n) { *n = p->log.size() + 1; return 0; }
int nvrtcGetProgramLog(Program* p, char* to) { memcpy(to, p->log.c_str(), p->log.size() + 1); return 0; }
int nvrtcGetCUBINSize(Program* p, size_t* n) { *n = p->code.size(); return 0; }
int nvrtcGetCUBIN(Program* p, char* to) { memcpy(to, p->code.data(), p->code.size()); return 0; }
}
