// Memory for vectors.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace {

// Starts at a cache line: what a vector reads across two costs twice.
template <class Value>
struct Lines {
    static constexpr std::align_val_t LINE{64};
    struct Free {
        void operator()(Value* values) const { ::operator delete[](values, LINE); }
    };
    std::unique_ptr<Value[], Free> values;

    Lines() = default;
    explicit Lines(int64_t n)
        : values(static_cast<Value*>(::operator new[](n * sizeof(Value), LINE))) {}
    Value* data() const { return values.get(); }
    Value& operator[](int64_t i) const { return values[i]; }
};

}  // namespace
