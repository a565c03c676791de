// What quantizing does to a tensor, in sums; and the shape of its blocks.
#pragma once

#include "strip.h"

namespace {

struct Errors {
    double signal, noise;  // sums of x² and of (x - q)²
    double nonzero, kept;  // how many of x, and of q, are not zero
};

constexpr int64_t RUN = 512;  // values summed in FP32 before they are added up in FP64

// `unit` is a power of two that brings the largest x near 1: squares neither over- nor underflow.
template <class In>
void add_errors(const In* __restrict x, const float* __restrict q, int64_t n, float unit, Errors& e) {
    for (int64_t begin = 0; begin < n; begin += RUN) {
        const int64_t end = std::min(begin + RUN, n);
        float signal = 0, noise = 0;
        int32_t nonzero = 0, kept = 0;
#pragma omp simd reduction(+ : signal, noise, nonzero, kept)
        for (int64_t i = begin; i < end; i++) {
            const float value = load(x[i]), a = value * unit, difference = (value - q[i]) * unit;
            signal += a * a;
            noise += difference * difference;
            nonzero += value != 0.0f;
            kept += q[i] != 0.0f;
        }
        e.signal += signal, e.noise += noise;
        e.nonzero += nonzero, e.kept += kept;
    }
}

// Of a strip whose values lie in the scratch space.
template <class In>
Errors strip_errors(const Job& job, const Place& p, const Scratch& s, float unit) {
    Errors e{0, 0, 0, 0};
    const int64_t row = p.block_row * job.block_rows, columns = p.end - p.begin;
    const int64_t rows = std::min(job.block_rows, job.rows - row);
    const In* x = static_cast<const In*>(job.x) + (p.outer * job.rows + row) * job.columns + p.begin;
    for (int64_t r = 0; r < rows; r++)
        add_errors(x + r * job.columns, s.tile.data() + r * columns, columns, unit, e);
    return e;
}

// Largest magnitude and sum of squares of each run of `size` columns; N as in run_amax, in halves: a
// loop over 32 values is too short for a compiler to sum it side by side.
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
            for (int half = N / 2; half >= 1; half /= 2)
                for (int i = 0; i < half; i++) squares[i] += squares[i + half];
            sum = squares[0];
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
