// What quantizing does to a tensor, in sums; and the shape of its blocks.
#pragma once

#include "strip.h"

#include <vector>

namespace {

// Of a tensor, or of what quantizing leaves of it.
struct Sums {
    double squares;  // of x, or of x - q
    double nonzero;  // how many of x, or of q, are not zero
};

constexpr int64_t LANES = 16, RUN = 32 * LANES;  // values summed in FP32 before FP64 takes them

// Sums side by side, so that neither the compiler nor the machine's vectors choose their order.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Counts __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));

inline Floats load_lanes(const float* x) {
    Floats values;
    std::memcpy(&values, x, sizeof values);
    return values;
}

inline Floats load_lanes(const Bf16* x) {
    uint16_t __attribute__((vector_size(2 * LANES))) narrow;
    std::memcpy(&narrow, x, sizeof narrow);
    return Floats(__builtin_convertvector(narrow, Counts) << 16);
}

struct Lanes {
    Doubles squares = {};
    Counts nonzero = {};

    // Of n values x, or of x - q. `unit` is a power of two that brings the largest x near 1: squares
    // neither over- nor underflow.
    template <bool QUANTIZED, class In>
    void add(const In* x, const float* q, int64_t n, float unit) {
        for (int64_t begin = 0; begin < n; begin += RUN) {
            const int64_t end = std::min(begin + RUN, n);
            Floats run = {};
            int64_t i = begin;
            for (; i + LANES <= end; i += LANES) {
                const Floats value = load_lanes(x + i);
                if (QUANTIZED) {
                    const Floats rounded = load_lanes(q + i);
                    add(value - rounded, rounded, unit, run);
                } else {
                    add(value, value, unit, run);
                }
            }
            if (i < end) {
                Floats value = {}, rounded = {};  // zeros add nothing
                for (int64_t lane = 0; i < end; i++, lane++) {
                    value[lane] = load(x[i]);
                    rounded[lane] = QUANTIZED ? q[i] : value[lane];
                }
                add(QUANTIZED ? value - rounded : value, rounded, unit, run);
            }
            squares += __builtin_convertvector(run, Doubles) * (1.0 / unit / unit);
        }
    }

    void add(Floats difference, Floats counted, float unit, Floats& run) {
        const Floats scaled = difference * unit;
        run += scaled * scaled;
        nonzero -= counted != 0.0f;  // true is -1
    }

    Sums total() const {
        Sums sums{0, 0};
        for (int64_t lane = 0; lane < LANES; lane++)
            sums.squares += squares[lane], sums.nonzero += nonzero[lane];
        return sums;
    }
};

// See Lanes::add.
float unit_of(const uint32_t* amax, int64_t blocks) {
    uint32_t most = 0;
    for (int64_t b = 0; b < blocks; b++) most = max_u(most, amax[b]);
    int exponent = 0;
    std::frexp(as_float(most), &exponent);
    return most < INFINITE ? std::ldexp(1.0f, std::min(-exponent, 126)) : 1.0f;
}

// A strip under formats that differ in their elements and scales alone; sums of x come first.
template <class In>
void add_strip(const Format* formats, const Job* jobs, const std::vector<StripFunction>& run,
               const Place& p, Scratch& s, std::vector<Lanes>& sums) {
    const Strip t(jobs[0], p);
    const In* x = static_cast<const In*>(jobs[0].x) + t.first;
    largest<In>(jobs[0], p, s);
    const float unit = unit_of(s.amax.data(), t.blocks);
    for (int64_t r = 0; r < t.rows; r++)
        sums[0].add<false>(x + r * t.stride, nullptr, t.columns, unit);
    for (size_t i = 0; i < run.size(); i++) {
        run[i](formats[i], jobs[i], p, s);
        for (int64_t r = 0; r < t.rows; r++)
            sums[i + 1].add<true>(x + r * t.stride, s.tile.data() + r * t.columns, t.columns, unit);
    }
}

// A loop over 32 values is too short for a compiler to sum it side by side.
template <int N>
double sum_of_halves(double* values) {
    if constexpr (N > 1) {
        for (int i = 0; i < N / 2; i++) values[i] += values[i + N / 2];
        return sum_of_halves<N / 2>(values);
    }
    return values[0];
}

// Largest magnitude and sum of squares of each run of `size` columns; N as in run_amax.
template <int N, class In>
void run_energy(const In* __restrict x, int64_t columns, int64_t size, double* __restrict most,
                double* __restrict energy) {
    for (int64_t c = 0, b = 0; c < columns; c += size, b++) {
        const int64_t n = N ? N : std::min(size, columns - c);
        decltype(magnitude(*x)) high = 0;
        for (int64_t i = 0; i < n; i++) high = std::max(high, magnitude(x[c + i]));
        double sum = 0;
        if (N) {
            double squares[N ? N : 1];
            for (int i = 0; i < N; i++) squares[i] = double(load(x[c + i])) * double(load(x[c + i]));
            sum = sum_of_halves<N ? N : 1>(squares);
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; i++) sum += double(load(x[c + i])) * double(load(x[c + i]));
        }
        most[b] = as_float(widen(high)), energy[b] = sum;
    }
}

// The same of columns, one more row at a time.
template <class In>
void column_energy(const In* __restrict x, int64_t columns, double* __restrict most,
                   double* __restrict energy) {
    for (int64_t c = 0; c < columns; c++) {
        const double v = load(x[c]), magnitude = __builtin_fabs(v);
        most[c] = most[c] > magnitude ? most[c] : magnitude;
        energy[c] += v * v;
    }
}

// max |x| / RMS of the blocks of one block row, in blocks along the rows or along the columns.
template <class In>
void crests(const Job& job, int64_t outer, int64_t block_row, double* most, double* energy) {
    const int64_t row = block_row * job.block_rows, size = job.block_columns;
    const int64_t rows = std::min(job.block_rows, job.rows - row), n = job.columns;
    const int64_t blocks = (n + size - 1) / size;
    const In* x = static_cast<const In*>(job.x) + (outer * job.rows + row) * n;
    std::fill_n(most, blocks, 0.0);
    std::fill_n(energy, blocks, 0.0);
    for (int64_t r = 0; r < rows; r++, x += n) {
        if (size == 1)
            column_energy(x, n, most, energy);
        else if (size == 32 && n % 32 == 0)
            run_energy<32>(x, n, size, most, energy);
        else if (size == 16 && n % 16 == 0)
            run_energy<16>(x, n, size, most, energy);
        else
            run_energy<0>(x, n, size, most, energy);
    }
    for (int64_t b = 0; b < blocks; b++)  // NaN for zeros and for what holds NaN or Inf
        most[b] /= std::sqrt(energy[b] / double(job.block_rows * size));
}

}  // namespace
