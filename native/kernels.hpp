// What the kernels are: plain functions on pointers, sizes and strides. They know no framework, and nothing here includes
// one. The maths is written once, in the *-inl.hpp files, and compiled once per instruction set; a Kernels table is what
// one of those compilations offers. All arguments have been checked above.
#pragma once

#include <atomic>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

namespace batchnorm {

enum class DType : int { float32, float64, bfloat16, float16 };

// planes: value (n, c, s) of a tensor (outer, channels, inner) lies at n·outer_stride + c·channel_stride + s.
// rows: value (r, c) of a tensor (outer, channels), inner = 1, lies at r·outer_stride + c.
// narrow: planes of few positions and many channels, without gaps between the channels.
enum class Layout : int { planes, rows, narrow };

// A function and, of leaky_relu, the slope below zero. What is defined here is compiled for every instruction set: always
// inlined, so that no machine meets another's.
struct Activation {
    enum Function : int { none, relu, leaky_relu, relu6, hardswish, silu, sigmoid, tanh, gelu };

    Function function;
    double slope;

    __attribute__((always_inline)) constexpr Activation(Function which = none, double below_zero = 0.01)
        : function(which), slope(below_zero) {}
    __attribute__((always_inline)) constexpr operator Function() const { return function; }
};

struct Shape {
    Layout layout;
    DType dtype;
    int64_t outer, channels, inner;
};

// A tensor of that shape; strides count elements. data == nullptr: there is none.
struct View {
    char* data;
    int64_t outer_stride, channel_stride;
};

// Parameters are float for float32, bfloat16 and float16 data, double for float64 data; nullptr: 1, and 0.
struct Affine {
    const void* weight;
    const void* bias;
    Activation activation;
};

// r ← (1 − momentum)·r + momentum·b, the variance with divisor n − 1; mean == nullptr: none are kept. A channel whose new
// values are not finite keeps its old ones, and `refused`, where there is one, is set.
struct Running {
    void* mean;
    void* variance;
    double momentum;
    std::atomic<bool>* refused;
};

// Per channel: mean, M2 = Σ(x − mean)², rstd = 1/√(M2/n + eps).
struct Statistics {
    double* mean;
    double* m2;
    double* rstd;
};

// Per channel, with g = dy · activation′: Σg and Σg·x̂.
struct Sums {
    double* dy;
    double* dy_xhat;
};

// What the backward pass reads of the forward pass.
//   x            the input; in place, the output y instead, from which x is recovered
//   bits         one bit an element, set where the activation passes the gradient (see `bits_per_run`)
//   residual     only read by activations whose slope is not told by the bits
//   kept, slot   in place: channels that cannot be recovered, as planes (outer, kept channels, inner); slot[c] < 0: none
struct Saved {
    View x;
    const uint16_t* bits;
    View residual;
    bool in_place;
    View kept;
    const int32_t* slot;
};

// Of each sample of a batch of feature maps the rows r ≡ first + n (mod step), where n is the number of the sample. Value
// (n, c, r, i) lies at n·sample_stride + c·channel_stride + r·row_stride + i; step ≤ rows.
struct SampleRows {
    DType dtype;
    int64_t samples, channels, rows, width;
    int64_t first, step;
    const char* data;
    int64_t sample_stride, channel_stride, row_stride;
};

// Runs task(begin, end, context) on parts of [0, n), at least `grain` long, on `threads` threads or fewer.
using Task = void (*)(int64_t begin, int64_t end, void* context);
struct Pool {
    void (*run)(int64_t n, int64_t grain, Task task, void* context);
    int threads;
};

struct Kernels {
    const char* name;
    int width;  // bytes of a vector register
    void (*moments)(const Shape&, View x, Statistics, double eps, const Pool&);
    void (*normalize)(const Shape&, View x, const Affine&, Statistics, View residual, View y, uint16_t* bits,
                      const Pool&);
    void (*train_forward)(const Shape&, View x, const Affine&, Statistics, double eps, Running, View residual, View y,
                          uint16_t* bits, const Pool&);
    void (*backward_reduce)(const Shape&, View dy, const Saved&, const Affine&, Statistics, Sums, const Pool&);
    // sums.dy == nullptr: mean and rstd do not depend on x (evaluation)
    void (*backward_input)(const Shape&, View dy, const Saved&, const Affine&, Statistics, Sums, double count, View dx,
                           View dresidual, const Pool&);
    void (*train_backward)(const Shape&, View dy, const Saved&, const Affine&, Statistics, Sums, View dx,
                           View dresidual, const Pool&);
    // mean and variance (divisor: the number of values) of each (sample, channel)
    void (*sample_moments)(const SampleRows&, double* mean, double* variance, const Pool&);
};

// Bits are stored in words of 16 elements (8 of float64), of one run after the other: a plane, a row, or a sample.
inline int64_t per_word(const Shape& shape) { return shape.dtype == DType::float64 ? 8 : 16; }
inline int64_t bit_run(const Shape& shape) {
    if (shape.layout == Layout::planes) return shape.inner;
    return shape.channels * shape.inner;
}
inline int64_t words_per_run(const Shape& shape) { return (bit_run(shape) + per_word(shape) - 1) / per_word(shape); }
inline int64_t words(const Shape& shape) {
    return words_per_run(shape) * shape.outer * (shape.layout == Layout::planes ? shape.channels : 1);
}

// The fewest channels whose planes fill whole words.
inline int64_t narrow_unit(const Shape& shape) { return per_word(shape) / std::gcd(shape.inner, per_word(shape)); }

// Takes the running mean and 1/√(running variance + eps) for the statistics to normalize by; M2 is not touched.
void take_stored(const Shape& shape, const void* mean, const void* variance, double eps, const Statistics& statistics);

// Takes new running statistics, but in channels where they are not finite; false if there is one.
bool take_finite(DType dtype, int64_t channels, const void* new_mean, const void* new_variance, void* mean,
                 void* variance);

// Which channels x cannot be recovered from y = γ·x̂ + β to the precision of the data: 1 where it cannot; how many.
int64_t mark_unrecoverable(const Shape& shape, const Affine& affine, uint8_t* marks);

// Asks for large pages behind a fresh output, before its first bytes are written: fewer page faults. Best effort.
void advise_huge_pages(void* data, int64_t bytes);

// Outputs of more bytes than this go around the caches: a quarter of the last of them, which it shares with its input and
// with what the layers around have in hand. Measured with the convolution that reads the output next, by
// `python -m benchmarks.train_step.streaming`. Tests lower it, so that small tensors go that way too.
extern int64_t stream_bytes;

// The instruction sets that this build has and this machine runs, the best last.
std::vector<std::string> available_isas();
// The one in use: the best at first.
const Kernels& active_kernels();
// Uses another one from now on, in all threads; false if it is not available.
bool use_isa(const std::string& name);

}  // namespace batchnorm
