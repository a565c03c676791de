// How many of all quotients of significands, of BF16 over FP32, does lowbit/kernels/reciprocal.h's
// correction get wrong? Powers of two change nothing in them.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

int main() {
    int64_t wrong = 0, uncorrected = 0;
    for (int a = 128; a < 256; a++) {
        const float x = float(a) / 128;
#pragma omp simd reduction(+ : wrong, uncorrected)
        for (uint32_t b = 0; b < 1u << 23; b++) {
            const uint32_t bits = 0x3F800000u + b;
            float factor;
            std::memcpy(&factor, &bits, 4);
            const float inverse = 1.0f / factor, near = x * inverse;
            const float quotient = std::fma(std::fma(-near, factor, x), inverse, near);
            wrong += quotient != x / factor, uncorrected += near != x / factor;
        }
    }
    std::printf("%lld %lld\n", (long long)wrong, (long long)uncorrected);
}
