// The quantizer of lowbit/quantize.py, bit for bit, in C++ that compilers vectorise.

#include "errors.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// Of a strip; of one whose values stay in the scratch space; of one that is a single row.
constexpr int64_t WIDTH = 4096, TILE_WIDTH = 512, ROW_WIDTH = 1024;
constexpr int64_t SIZE[] = {4, 2, 1};  // of the types, see find

template <class In, class Out, bool FLOAT, int ROUNDING>
StripFunction by_scale(const Format& f) {
    return f.scale == E8M0 ? strip<In, Out, FLOAT, ROUNDING, true>
                           : strip<In, Out, FLOAT, ROUNDING, false>;
}

template <class In, class Out, bool FLOAT>
StripFunction by_rounding(const Format& f) {
    switch (f.rounding) {
        case NEAREST: return by_scale<In, Out, FLOAT, NEAREST>(f);
        case HALF_AWAY: return by_scale<In, Out, FLOAT, HALF_AWAY>(f);
        default: return by_scale<In, Out, FLOAT, STOCHASTIC>(f);
    }
}

template <class In, class Out>
StripFunction by_element(const Format& f) {
    return f.is_float ? by_rounding<In, Out, true>(f) : by_rounding<In, Out, false>(f);
}

// Types: 0 FP32, 1 BF16, 2 INT8 codes of integer elements.
StripFunction find(const Format& f, int in, int out) {
    if (out == 2) return in ? by_rounding<Bf16, int8_t, false>(f) : by_rounding<float, int8_t, false>(f);
    if (out == 1) return by_element<Bf16, Bf16>(f);
    return in ? by_element<Bf16, float>(f) : by_element<float, float>(f);
}

// How a tensor is cut: [outer, block rows, segments, strips]; no strip crosses a segment.
struct Cut {
    int64_t width, strips, segments, block_rows;

    Cut(const Job& job, int64_t target) {
        width = std::max<int64_t>(1, target / job.block_columns) * job.block_columns;
        strips = (job.segment + width - 1) / width;
        segments = job.columns / job.segment;
        block_rows = (job.rows + job.block_rows - 1) / job.block_rows;
    }

    int64_t places(const Job& job) const { return job.outer * block_rows * segments * strips; }

    Place place(int64_t i, const Job& job) const {
        const int64_t strip = i % strips, begin = i / strips % segments * job.segment;
        const int64_t row = i / (strips * segments);
        return {row / block_rows, row % block_rows, begin + strip * width,
                begin + std::min((strip + 1) * width, job.segment)};
    }

    Scratch scratch(const Job& job) const {
        return Scratch(std::min(width, job.segment), job.transposed || !job.out ? job.block_rows : 0);
    }
};

// Fresh pages of 4 KiB cost more than the quantizing.
void use_huge_pages(void* out, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t huge = 1 << 21;
    const uintptr_t from = (reinterpret_cast<uintptr_t>(out) + huge - 1) & ~(huge - 1);
    const uintptr_t to = (reinterpret_cast<uintptr_t>(out) + bytes) & ~(huge - 1);
    if (to > from + 4 * huge) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace

extern "C" {

void lowbit_quantize(const Format* format, const Job* job, int32_t in, int32_t out,
                     int32_t threads) {
    const StripFunction run = find(*format, in, out);
    const auto look = job->amax ? (in ? kept_largest<Bf16> : kept_largest<float>)
                                : (in ? largest<Bf16> : largest<float>);
    const Cut cut(*job, job->block_rows == 1 ? ROW_WIDTH : WIDTH);
    const int64_t places = cut.places(*job);
    use_huge_pages(job->out, job->outer * job->rows * job->columns * SIZE[out]);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch = cut.scratch(*job);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < places; i++) {
            const Place place = cut.place(i, *job);
            look(*job, place, scratch);
            run(*format, *job, place, scratch);
        }
    }
}

// The same matrix twice, in one read: blocks along its rows for `across`, along its columns for
// `down`.
void lowbit_quantize_both(const Format* across_format, const Job* across, const Format* down_format,
                          const Job* down, int32_t in, int32_t across_out, int32_t down_out,
                          int32_t threads) {
    const StripFunction run_across = find(*across_format, in, across_out);
    const StripFunction run_down = find(*down_format, in, down_out);
    const auto look = in ? largest<Bf16> : largest<float>;
    const Cut cut(*down, std::max(TILE_WIDTH / across->block_columns, int64_t(1)) * across->block_columns);
    const int64_t places = cut.places(*down);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch = cut.scratch(*down);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < places; i++) {
            const Place place = cut.place(i, *down);
            const int64_t begin = place.block_row * down->block_rows;
            const int64_t end = std::min(begin + down->block_rows, down->rows);
            for (int64_t row = begin; row < end; row++) {
                const Place line{0, row, place.begin, place.end};
                look(*across, line, scratch);
                run_across(*across_format, *across, line, scratch);
            }
            look(*down, place, scratch);
            run_down(*down_format, *down, place, scratch);
        }
    }
}

// scale.py's tensor_scale, to job->tensor_scale; the blocks' largest magnitudes are kept in job->amax.
void lowbit_tensor_scale(const Job* job, int32_t in, int32_t threads, float most_code) {
    const auto run = in ? keep_largest<Bf16> : keep_largest<float>;
    const Cut cut(*job, job->block_rows == 1 ? ROW_WIDTH : WIDTH);
    const int64_t places = cut.places(*job);
    uint32_t most = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(max : most)
    {
        Scratch scratch = cut.scratch(*job);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < places; i++)
            most = max_u(most, run(*job, cut.place(i, *job), scratch));
    }
    *job->tensor_scale = at_least(as_float(most) / most_code, 0x1p-117f);
}

// What quantizing to each of `count` formats would do to one tensor, in one read of it; the jobs have
// the same blocks and no `out`. Sums of x come first. The order of summation is the same for any
// number of threads.
void lowbit_errors(const Format* formats, const Job* jobs, int32_t count, int32_t in,
                   int32_t threads, Sums* sums) {
    constexpr int64_t together = 16;  // places, whose sums are added up side by side
    const Cut cut(*jobs, jobs->block_rows == 1 ? ROW_WIDTH : TILE_WIDTH / 2);
    const int64_t places = cut.places(*jobs), parts = (places + together - 1) / together;
    std::vector<StripFunction> run;
    for (int32_t i = 0; i < count; i++) run.push_back(find(formats[i], in, 0));
    const auto add = in ? add_strip<Bf16> : add_strip<float>;
    std::vector<Sums> found(parts * (count + 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch = cut.scratch(*jobs);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            std::vector<Lanes> lanes(count + 1);
            for (int64_t i = part * together; i < std::min((part + 1) * together, places); i++)
                add(formats, jobs, run, cut.place(i, *jobs), scratch, lanes);
            for (int32_t i = 0; i <= count; i++) found[part * (count + 1) + i] = lanes[i].total();
        }
    }
    for (int32_t i = 0; i <= count; i++) {
        sums[i] = {0, 0};
        for (int64_t part = 0; part < parts; part++) {
            sums[i].squares += found[part * (count + 1) + i].squares;
            sums[i].nonzero += found[part * (count + 1) + i].nonzero;
        }
    }
}

// Crest factors of all blocks, as [outer, block rows, blocks in a row].
void lowbit_crest_factors(const Job* job, int32_t in, int32_t threads, double* out) {
    const int64_t block_rows = (job->rows + job->block_rows - 1) / job->block_rows;
    const int64_t blocks = (job->columns + job->block_columns - 1) / job->block_columns;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<double> energy(blocks);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < job->outer * block_rows; i++) {
            const auto run = in ? crests<Bf16> : crests<float>;
            run(*job, i / block_rows, i % block_rows, out + i * blocks, energy.data());
        }
    }
}

}  // extern "C"
