// One call of a kernel in a process of another architecture: its arguments come on the standard input,
// the memory that they point to goes back on the standard output. test_arm.py holds the same struct.
#include "quantize.h"

#include <cstdio>
#include <vector>

extern "C" {
void lowbit_quantize(const Format*, const Job*, int32_t in, int32_t out, int32_t threads);
void lowbit_tensor_scale(const Job*, int32_t in, int32_t threads, float most_code);
int32_t lowbit_integer_matmul(const void* product);
}

struct Call {
    int32_t kind, in, out, buffers;
    float most_code;
    Format format;
    alignas(8) char job[256];  // a Job or a Product
};

int main() {
    Call call;
    if (std::fread(&call, sizeof call, 1, stdin) != 1) return 1;
    std::vector<std::vector<char>> memory(call.buffers);
    for (auto& buffer : memory) {
        int64_t where[2];  // of the pointer in the job; bytes
        if (std::fread(where, sizeof where, 1, stdin) != 1) return 1;
        buffer.resize(where[1]);
        if (std::fread(buffer.data(), 1, where[1], stdin) != size_t(where[1])) return 1;
        const void* at = buffer.data();
        std::memcpy(call.job + where[0], &at, sizeof at);
    }
    const Job* job = reinterpret_cast<const Job*>(call.job);
    if (call.kind == 0) lowbit_quantize(&call.format, job, call.in, call.out, 1);
    if (call.kind == 1) lowbit_tensor_scale(job, call.in, 1, call.most_code);
    if (call.kind == 2) lowbit_integer_matmul(call.job);
    for (const auto& buffer : memory) std::fwrite(buffer.data(), 1, buffer.size(), stdout);
}
