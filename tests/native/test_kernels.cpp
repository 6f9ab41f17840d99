// The kernels against plain loops in double precision, on every instruction set that this machine runs.
//
//     test_kernels [--isa NAME] [--every N] [--seed I]
//
// A case is told by one number, its seed: sizes, strides, dtype, activation, threads and data follow from it. What fails
// is printed with the command that runs it alone.
//
// Bounds are those of kernels/accuracy.py, in the same units: half a unit of eps(dtype) for the one rounding to the dtype,
// and units of eps(working) × the sum of the magnitudes that a result is made of. float64 is allowed twice as much, for the
// loops here round as the kernels do. dy is zero where the argument of an activation is so near to a kink that rounding may
// put it on either side. In place, x̂ is recovered from a rounded y: its error, δy/|γ|, is carried on to the gradients.
//
// All memory outside the tensors, between their planes or rows too, holds NaN: whoever uses it spoils a result, whoever
// writes there is found out afterwards. With the address sanitizer buffers have their exact size, without guards.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels.hpp"

using namespace batchnorm;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t GUARD = 0;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr int64_t GUARD = 0;
#else
constexpr int64_t GUARD = 192;
#endif
#else
constexpr int64_t GUARD = 192;
#endif

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double EPS64 = 2.220446049250313e-16;

using Doubles = std::vector<double>;

// -- reports ---------------------------------------------------------------------------------------------------------

std::mutex report_lock;
std::atomic<int64_t> failures{0}, comparisons{0};
std::atomic<int> failed_cases{0};

// -- random numbers --------------------------------------------------------------------------------------------------

struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
    bool one_in(int64_t n) { return below(n) == 0; }
    double uniform() { return double(next() >> 11) * 0x1p-53; }
    double normal() {  // near enough: twelve uniform numbers
        double total = -6;
        for (int i = 0; i < 12; ++i) total += uniform();
        return total;
    }
    template <size_t n>
    int64_t of(const int64_t (&choices)[n]) {
        return choices[below(int64_t(n))];
    }
};

// -- numbers in memory -----------------------------------------------------------------------------------------------

int64_t width_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
const char* name_of(DType dtype) {
    static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
    return names[int(dtype)];
}

struct Precision {
    double eps, tiny, working;  // of the dtype, its smallest normal number, eps of the working precision
};
Precision precision_of(DType dtype) {
    switch (dtype) {
        case DType::float64: return {EPS64, 2.2250738585072014e-308, EPS64};
        case DType::float32: return {0x1p-23, 0x1p-126, 0x1p-23};
        case DType::bfloat16: return {0x1p-7, 0x1p-126, 0x1p-23};
        case DType::float16: return {0x1p-10, 0x1p-14, 0x1p-23};
    }
    std::abort();
}

// The nearest number with that many bits of precision, whose exponents end at `lowest` and `highest`.
double rounded(double v, int bits, int lowest, int highest) {
    if (!std::isfinite(v) || v == 0) return v;
    const int exponent = std::max(std::ilogb(v), lowest);
    const double result = std::ldexp(std::nearbyint(std::ldexp(v, bits - 1 - exponent)), exponent - bits + 1);
    return std::fabs(result) >= std::ldexp(1.0, highest + 1) ? std::copysign(INFINITE, v) : result;
}

void write(char* at, DType dtype, double v) {
    if (dtype == DType::float64) {
        std::memcpy(at, &v, 8);
    } else if (dtype == DType::float16) {
        v = rounded(v, 11, -14, 15);
        uint16_t bits = std::signbit(v) ? 0x8000 : 0;
        if (std::isnan(v))
            bits |= 0x7e00;
        else if (std::isinf(v))
            bits |= 0x7c00;
        else if (std::fabs(v) < 0x1p-14)
            bits |= uint16_t(std::fabs(v) * 0x1p24);
        else
            bits |= uint16_t((std::ilogb(v) + 15) << 10 | int(std::ldexp(std::fabs(v), 10 - std::ilogb(v)) - 1024));
        std::memcpy(at, &bits, 2);
    } else {
        const float f = dtype == DType::bfloat16 ? float(rounded(v, 8, -126, 127)) : float(v);
        if (dtype == DType::float32) return void(std::memcpy(at, &f, 4));
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        const uint16_t high = uint16_t(bits >> 16);
        std::memcpy(at, &high, 2);
    }
}

double read(const char* at, DType dtype) {
    if (dtype == DType::float64) {
        double v;
        std::memcpy(&v, at, 8);
        return v;
    }
    if (dtype == DType::float32) {
        float v;
        std::memcpy(&v, at, 4);
        return v;
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    if (dtype == DType::bfloat16) {
        const uint32_t word = uint32_t(bits) << 16;
        float v;
        std::memcpy(&v, &word, 4);
        return v;
    }
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const double size = exponent == 31  ? (fraction ? NOT_A_NUMBER : INFINITE)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(fraction + 1024, exponent - 25);
    return bits & 0x8000 ? -size : size;
}

// Memory of an exact size, aligned to 64 bytes and then shifted, filled with NaN, between guards of NaN.
class Buffer {
public:
    Buffer(int64_t bytes, int64_t shift) : bytes_(bytes), before_(GUARD + shift), total_(before_ + bytes + GUARD) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, size_t(std::max<int64_t>(1, total_))) != 0) std::abort();
        memory_.reset(static_cast<char*>(memory));
        std::memset(memory, 0xff, size_t(total_));
    }
    char* data() const { return memory_.get() + before_; }
    int64_t bytes() const { return bytes_; }
    bool guards_untouched() const {
        return clean(memory_.get(), memory_.get() + before_) && clean(data() + bytes_, memory_.get() + total_);
    }
    static bool clean(const char* begin, const char* end) {
        return std::all_of(begin, end, [](char byte) { return byte == char(0xff); });
    }

private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    int64_t bytes_, before_, total_;
    std::unique_ptr<char, Free> memory_;
};

template <class T>
class Array {
public:
    explicit Array(int64_t size) : buffer_(size * int64_t(sizeof(T)), 0) {}
    T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
    T& operator[](int64_t i) const { return data()[i]; }
    bool guards_untouched() const { return buffer_.guards_untouched(); }

private:
    Buffer buffer_;
};

// -- a case ----------------------------------------------------------------------------------------------------------

enum class Data { plain, far, huge, constant, special };

struct Case {
    uint64_t seed;
    Shape shape;
    Activation activation;
    bool residual, weight, bias, gaps, shifted, streaming;
    Data data;
    int threads;

    int64_t size() const { return shape.outer * shape.channels * shape.inner; }
    double count() const { return double(shape.outer) * double(shape.inner); }
    int64_t channel_of(int64_t e) const { return e / shape.inner % shape.channels; }
    DType parameters() const { return shape.dtype == DType::float64 ? DType::float64 : DType::float32; }

    std::string describe() const {
        static const char* const activations[] = {"none", "relu",    "leaky_relu", "relu6", "hardswish",
                                                  "silu", "sigmoid", "tanh",       "gelu"};
        static const char* const layouts[] = {"planes", "rows", "narrow"};
        static const char* const kinds[] = {"plain", "far", "huge", "constant", "special"};
        char text[400];
        std::snprintf(text, sizeof text, "%s %s %lldx%lldx%lld %s%s%s%s%s%s%s, %s data, %d threads",
                      name_of(shape.dtype), layouts[int(shape.layout)], (long long)shape.outer,
                      (long long)shape.channels, (long long)shape.inner, activations[int(activation)],
                      residual ? " residual" : "", weight ? " weight" : "", bias ? " bias" : "", gaps ? " gaps" : "",
                      shifted ? " shifted" : "", streaming ? " streaming" : "", kinds[int(data)], threads);
        return text;
    }
};

constexpr int64_t LENGTHS = 80;
constexpr uint64_t SWEEP = 12 * LENGTHS * 4;  // every dtype, layout and length of a run, four times

struct Size {
    Layout layout;
    int64_t outer, channels, inner;
};
// Large enough for several units, blocks and tasks.
constexpr Size LARGE[] = {
    {Layout::planes, 40, 1, 1000}, {Layout::planes, 3, 2, 20001}, {Layout::planes, 2, 3, 16385},
    {Layout::planes, 1, 1, 50000}, {Layout::planes, 700, 2, 49},  {Layout::planes, 5, 130, 9},
    {Layout::planes, 9000, 2, 2},  {Layout::rows, 1400, 3, 1},    {Layout::rows, 700, 65, 1},
    {Layout::rows, 100, 1031, 1},  {Layout::rows, 20000, 1, 1},   {Layout::narrow, 300, 130, 49},
    {Layout::narrow, 3, 520, 196}, {Layout::narrow, 9000, 16, 4},
};
constexpr uint64_t LARGE_SIZES = sizeof LARGE / sizeof LARGE[0];
constexpr uint64_t CASES = SWEEP + LARGE_SIZES * 4 * 2;

Case case_of(uint64_t seed) {
    static constexpr int64_t longest[] = {127, 128, 129, 511, 512, 513, 1000, 1023, 1025, 2051};
    static constexpr int64_t channels[] = {1, 2, 3, 4, 5, 7, 16, 17, 33};
    static constexpr int64_t outer[] = {1, 2, 3, 5, 8, 16, 33, 129, 300, 700};
    static constexpr int64_t threads[] = {1, 2, 5};
    Random random{seed * 7919 + 1};
    Case c{};
    c.seed = seed;
    if (seed < SWEEP) {
        c.shape.dtype = DType(seed % 4);
        c.shape.layout = Layout(seed / 4 % 3);
        const int64_t k = int64_t(seed / 12 % LENGTHS), length = k < 70 ? k + 1 : longest[k - 70];
        c.activation = Activation(Activation::Function(seed / 12 % 9), seed / 108 % 2 ? 0.2 : 0.01);
        c.residual = seed / (12 * LENGTHS) % 2 == 1;
        const int64_t most = 1 + 8000 / length;
        if (c.shape.layout != Layout::rows) {
            c.shape.channels = std::min(most, random.of(channels));
            c.shape.inner = length;
            c.shape.outer = std::min(std::max<int64_t>(1, most / c.shape.channels), random.of(outer));
        } else {
            c.shape.channels = length;
            c.shape.inner = 1;
            c.shape.outer = std::min(std::max<int64_t>(40, most), random.of(outer));
        }
    } else {
        const uint64_t k = seed - SWEEP;
        const Size& size = LARGE[k % LARGE_SIZES];
        c.shape = {size.layout, DType(k / LARGE_SIZES % 4), size.outer, size.channels, size.inner};
        c.residual = k / LARGE_SIZES / 4 % 2 == 1;
        c.activation = Activation(Activation::Function(random.below(9)), random.below(2) ? 0.2 : 0.01);
    }
    c.weight = !random.one_in(5);
    c.bias = !random.one_in(5);
    c.gaps = random.one_in(3);
    c.shifted = random.one_in(3);
    c.streaming = random.one_in(3);
    c.threads = int(random.of(threads));
    static constexpr Data kinds[] = {Data::plain, Data::plain, Data::plain, Data::plain,    Data::far,
                                     Data::far,   Data::huge,  Data::huge,  Data::constant, Data::special};
    c.data = kinds[random.below(10)];
    return c;
}

// A tensor of the shape of a case, with gaps and shift if it says so.
class Tensor {
public:
    Tensor(const Case& c, int64_t gap) : shape_(c.shape), buffer_(make(c, c.gaps ? gap : 0)) {}
    Tensor(const Case& c, int64_t gap, const Doubles& values) : Tensor(c, gap) { fill(values); }

    View view() const { return {buffer_.data(), outer_stride_, channel_stride_}; }
    char* at(int64_t e) const {
        const int64_t s = e % shape_.inner, c = e / shape_.inner % shape_.channels,
                      n = e / shape_.inner / shape_.channels;
        const int64_t place = n * outer_stride_ + c * channel_stride_ + s;
        return buffer_.data() + place * width_of(shape_.dtype);
    }
    int64_t size() const { return shape_.outer * shape_.channels * shape_.inner; }
    void fill(const Doubles& values) {
        for (int64_t e = 0; e < size(); ++e) write(at(e), shape_.dtype, values[size_t(e)]);
    }
    double operator[](int64_t e) const { return read(at(e), shape_.dtype); }
    Doubles values() const {
        Doubles all(size_t(size()), 0.0);
        for (int64_t e = 0; e < size(); ++e) all[size_t(e)] = (*this)[e];
        return all;
    }
    // Whether guards and gaps hold what they held.
    bool outside_untouched() const {
        if (!buffer_.guards_untouched()) return false;
        std::vector<char> copy(buffer_.data(), buffer_.data() + buffer_.bytes());
        for (int64_t e = 0; e < size(); ++e)
            std::memset(copy.data() + (at(e) - buffer_.data()), 0xff, size_t(width_of(shape_.dtype)));
        return Buffer::clean(copy.data(), copy.data() + copy.size());
    }

private:
    Buffer make(const Case& c, int64_t gap) {
        // narrow planes have no gaps between channels
        channel_stride_ = shape_.inner + (shape_.layout == Layout::planes ? gap : 0);
        outer_stride_ = shape_.channels * channel_stride_ + gap;
        const int64_t span =
            (shape_.outer - 1) * outer_stride_ + (shape_.channels - 1) * channel_stride_ + shape_.inner;
        return Buffer(span * width_of(shape_.dtype), c.shifted ? width_of(shape_.dtype) : 0);
    }
    Shape shape_;
    int64_t outer_stride_ = 0, channel_stride_ = 0;
    Buffer buffer_;
};

// -- threads ---------------------------------------------------------------------------------------------------------

// Fresh threads for every loop, each with one contiguous share, the first on the caller.
template <int threads>
void run_on_threads(int64_t n, int64_t grain, Task task, void* context) {
    const int64_t shares = std::min<int64_t>(threads, std::max<int64_t>(1, n / std::max<int64_t>(1, grain)));
    std::vector<std::thread> others;
    for (int64_t k = 1; k < shares; ++k)
        others.emplace_back([=] { task(n * k / shares, n * (k + 1) / shares, context); });
    task(0, n / shares, context);
    for (std::thread& other : others) other.join();
}
Pool pool_of(int threads) {
    if (threads == 1) return {run_on_threads<1>, 1};
    if (threads == 2) return {run_on_threads<2>, 2};
    return {run_on_threads<5>, 5};
}

// -- the reference ---------------------------------------------------------------------------------------------------

double function_of(Activation activation, double z) {
    switch (activation) {
        case Activation::none: return z;
        case Activation::relu: return z < 0 ? 0 : z;
        case Activation::leaky_relu: return z > 0 ? z : z * activation.slope;
        case Activation::relu6: return z < 0 ? 0 : z > 6 ? 6 : z;
        case Activation::hardswish: return z * (z < -3 ? 0 : z > 3 ? 6 : z + 3) / 6;
        case Activation::silu: return z / (1 + std::exp(-z));
        case Activation::sigmoid: return 1 / (1 + std::exp(-z));
        case Activation::tanh: return std::tanh(z);
        case Activation::gelu: return 0.5 * z * std::erfc(-z * std::sqrt(0.5));
    }
    std::abort();
}
double slope_of(Activation activation, double z) {
    const double s = 1 / (1 + std::exp(-z));
    switch (activation) {
        case Activation::none: return 1;
        case Activation::relu: return z > 0 ? 1 : 0;
        case Activation::leaky_relu: return z > 0 ? 1 : activation.slope;
        case Activation::relu6: return z > 0 && z < 6 ? 1 : 0;
        case Activation::hardswish: return z <= -3 ? 0 : z < 3 ? z / 3 + 0.5 : 1;
        case Activation::silu: return s * (1 + z * (1 - s));
        case Activation::sigmoid: return s * (1 - s);
        case Activation::tanh: return 1 - std::tanh(z) * std::tanh(z);
        case Activation::gelu:
            return 0.5 * std::erfc(-z * std::sqrt(0.5)) + z * 0.3989422804014327 * std::exp(-0.5 * z * z);
    }
    std::abort();
}
bool near_kink(Activation activation, double z, double margin) {
    switch (activation) {
        case Activation::relu:
        case Activation::leaky_relu: return std::fabs(z) <= margin;
        case Activation::relu6: return std::fabs(z) <= margin || std::fabs(z - 6) <= margin;
        case Activation::hardswish: return std::fabs(z - 3) <= margin || std::fabs(z + 3) <= margin;
        default: return false;
    }
}

// A sum that loses nothing worth a unit (Neumaier).
struct Sum {
    double total = 0, lost = 0;
    void add(double v) {
        const double next = total + v;
        lost += std::fabs(total) >= std::fabs(v) ? (total - next) + v : (v - next) + total;
        total = next;
    }
    double value() const { return std::isfinite(total) ? total + lost : total; }
};
using Sums2 = std::vector<Sum>;
Doubles values_of(const Sums2& sums) {
    Doubles values;
    for (const Sum& sum : sums) values.push_back(sum.value());
    return values;
}

struct Inputs {
    Doubles x, residual, dy, weight, bias;  // as they are in memory; weight and bias always there, 1 and 0 if not given
};

// Statistics of the batch and how far a kernel's may be from them.
struct ExactMoments {
    Doubles mean, m2, of_mean, of_m2;
};
ExactMoments moments_of(const Case& c, const Inputs& in) {
    const size_t channels = size_t(c.shape.channels);
    const Precision p = precision_of(c.shape.dtype);
    const double n = c.count();
    Sums2 sum(channels), size(channels), square(channels);
    for (int64_t e = 0; e < c.size(); ++e) {
        sum[size_t(c.channel_of(e))].add(in.x[size_t(e)]);
        size[size_t(c.channel_of(e))].add(std::fabs(in.x[size_t(e)]));
    }
    // Additions after each other in the working precision: 1024 elements in 16 lanes, or 128 rows in two chains; in planes
    // shorter than a register, one chain an element. accuracy.py takes their roundings for random; data of few values, as
    // far from zero in half precision, may round one way all along: half a unit each, of half the total on average.
    const double in_a_row = c.shape.layout != Layout::planes ? 64 : std::max(64.0, 512.0 / double(c.shape.inner));
    ExactMoments m{values_of(sum), {}, {}, {}};
    for (double& mean : m.mean) mean /= n;
    for (int64_t e = 0; e < c.size(); ++e) {
        const double d = in.x[size_t(e)] - m.mean[size_t(c.channel_of(e))];
        square[size_t(c.channel_of(e))].add(d * d);
    }
    m.m2 = values_of(square);
    for (size_t k = 0; k < channels; ++k) {
        m.of_mean.push_back(4 * p.working * std::sqrt(m.m2[k] / n) + EPS64 * size[k].value());
        // merging subtracts the means of parts, each rounded in float64
        const double of_merging = 2 * EPS64 * std::fabs(m.mean[k]) * std::sqrt(n * m.m2[k]);
        m.of_m2.push_back(((8 + in_a_row / 4) * p.working + n * EPS64) * m.m2[k] + n * m.of_mean[k] * m.of_mean[k] +
                          of_merging);
    }
    return m;
}

// What follows once mean and rstd are known; per element z, the magnitude of its terms, y.
struct Forward {
    Doubles mean, rstd, z, magnitude, y, of_y;
};
// `moments`: the kernel takes the statistics itself; nullptr: it is given these.
Forward forward_of(const Case& c, const Inputs& in, Doubles mean, Doubles rstd, const ExactMoments* moments) {
    Forward f{std::move(mean), std::move(rstd), {}, {}, {}, {}};
    const Precision p = precision_of(c.shape.dtype);
    const double twice = c.shape.dtype == DType::float64 ? 2 : 1;
    for (int64_t e = 0; e < c.size(); ++e) {
        const size_t i = size_t(e), k = size_t(c.channel_of(e));
        const double w = in.weight[k], r = c.residual ? in.residual[i] : 0, x = in.x[i];
        const double xhat = (x - f.mean[k]) * f.rstd[k];
        const double z = xhat * w + in.bias[k] + r, y = function_of(c.activation, z);
        const double magnitude =
            std::fabs(w) * f.rstd[k] * (std::fabs(x) + std::fabs(f.mean[k])) + std::fabs(in.bias[k]) + std::fabs(r);
        double bound = (0.5 * p.eps + 4 * p.working) * std::fabs(y) + 6 * p.working * magnitude + p.tiny * p.eps;
        if (moments) {
            const double var = moments->of_m2[k] / c.count();
            bound += 1.5 * std::fabs(w) *
                     (moments->of_mean[k] * f.rstd[k] + std::fabs(xhat) * 0.5 * var * f.rstd[k] * f.rstd[k]);
        }
        f.z.push_back(z);
        f.magnitude.push_back(magnitude);
        f.y.push_back(y);
        f.of_y.push_back(twice * bound);
    }
    return f;
}

struct Backward {
    Doubles sum_g, sum_gx, dx, dresidual;
    Doubles of_sum_g, of_sum_gx, of_dx, of_dresidual;
};
// `recovered`: channels whose x̂ is recovered from y.
Backward backward_of(const Case& c, const Inputs& in, const Forward& f, bool centered,
                     const std::vector<bool>& recovered) {
    const Precision p = precision_of(c.shape.dtype);
    const double twice = c.shape.dtype == DType::float64 ? 2 : 1, units = 24 * p.working, n = c.count();
    const size_t channels = size_t(c.shape.channels);
    Sums2 g_sum(channels), gx_sum(channels), g_size(channels), gx_size(channels), g_loss(channels);
    Doubles g, big_g, xhat, big_x, loss;
    for (int64_t e = 0; e < c.size(); ++e) {
        const size_t i = size_t(e), k = size_t(c.channel_of(e));
        const bool none = c.activation == Activation::none;
        g.push_back(in.dy[i] == 0 ? 0 : in.dy[i] * slope_of(c.activation, f.z[i]));
        big_g.push_back(std::fabs(in.dy[i]) * (none ? 1 : 1.5 + f.magnitude[i]));
        xhat.push_back((in.x[i] - f.mean[k]) * f.rstd[k]);
        big_x.push_back(f.rstd[k] * (std::fabs(in.x[i]) + std::fabs(f.mean[k])));
        const double of_z = 0.5 * p.eps * std::fabs(f.z[i]) + 12 * p.working * f.magnitude[i] +
                            (none ? 1 : 1 / c.activation.slope) * p.tiny * p.eps;
        loss.push_back(recovered[k] ? of_z / std::fabs(in.weight[k]) : 0);
        g_sum[k].add(g[i]);
        gx_sum[k].add(g[i] * xhat[i]);
        g_size[k].add(big_g[i]);
        gx_size[k].add(big_g[i] * big_x[i]);
        g_loss[k].add(std::fabs(g[i]) * loss[i]);
    }
    Backward b;
    b.sum_g = values_of(g_sum);
    b.sum_gx = values_of(gx_sum);
    for (size_t k = 0; k < channels; ++k) {
        b.of_sum_g.push_back(twice * units * g_size[k].value());
        b.of_sum_gx.push_back(twice * (units * gx_size[k].value() + g_loss[k].value()));
    }
    for (int64_t e = 0; e < c.size(); ++e) {
        const size_t i = size_t(e), k = size_t(c.channel_of(e));
        const double scale = in.weight[k] * f.rstd[k];
        double dx = g[i], terms = big_g[i], of_x = 0;
        if (centered) {
            dx -= b.sum_g[k] / n + xhat[i] * b.sum_gx[k] / n;
            terms += g_size[k].value() / n + big_x[i] * gx_size[k].value() / n;
            of_x = loss[i] * std::fabs(b.sum_gx[k]) / n + (big_x[i] + loss[i]) * g_loss[k].value() / n;
        }
        b.dx.push_back(scale * dx);
        b.of_dx.push_back(
            twice * (0.5 * p.eps * std::fabs(scale * dx) + std::fabs(scale) * (units * terms + of_x) + p.tiny * p.eps));
        b.dresidual.push_back(g[i]);
        b.of_dresidual.push_back(twice * ((0.5 * p.eps + units) * big_g[i] + p.tiny * p.eps));
    }
    return b;
}

// -- one case --------------------------------------------------------------------------------------------------------

class Run {
public:
    explicit Run(const Case& c) : c_(c), kernels_(active_kernels()), pool_(pool_of(c.threads)) {}

    void all() {
        make_inputs();
        const ExactMoments moments = moments_of(c_, in_);
        Doubles rstd;
        for (double m2 : moments.m2) rstd.push_back(1 / std::sqrt(m2 / c_.count() + EPS));
        const Forward training = forward_of(c_, in_, moments.mean, rstd, &moments);
        // any other statistics, near enough for the activations to do something
        Doubles eval_mean, eval_rstd;
        for (int64_t k = 0; k < c_.shape.channels; ++k) {
            const double center = std::isfinite(moments.mean[size_t(k)]) ? moments.mean[size_t(k)] : 0;
            const double scale = std::isfinite(rstd[size_t(k)]) ? rstd[size_t(k)] : 1;
            eval_mean.push_back(center + random_.normal() / scale * 0.1);
            eval_rstd.push_back(scale * (0.5 + random_.uniform()));
        }
        const Forward eval = forward_of(c_, in_, eval_mean, eval_rstd, nullptr);

        check_moments(moments, rstd);
        check_forward("train_forward", training, &moments, true, false);
        check_forward("train_forward in place", training, &moments, true, true);
        check_forward("moments, normalize", training, &moments, false, false);
        check_forward("normalize", eval, nullptr, false, false);
        check_forward("normalize in place", eval, nullptr, false, true);

        const std::vector<bool> none(size_t(c_.shape.channels), false);
        const Doubles dy = in_.dy;
        keep_from_kinks(training);
        const Backward of_training = backward_of(c_, in_, training, true, none);
        for (const bool fused : {true, false})
            for (const bool over_dy : {false, true})
                check_backward(fused ? "train_backward" : "backward_reduce, backward_input", training, of_training,
                               true, fused, over_dy);
        if (!c_.residual && (c_.activation == Activation::none || c_.activation == Activation::leaky_relu) &&
            c_.data != Data::special)
            check_recovering();
        in_.dy = dy;
        keep_from_kinks(eval);
        check_backward("backward_input in eval", eval, backward_of(c_, in_, eval, false, none), false, false, false);
    }

    bool failed() const { return failed_; }

private:
    static constexpr double EPS = 1e-5, MOMENTUM = 0.1;

    void make_inputs() {
        const DType dtype = c_.shape.dtype;
        const int64_t channels = c_.shape.channels, size = c_.size();
        // the mean over the standard deviation, as far apart as the dtype can tell; and large beyond squaring
        const double far = dtype == DType::float16 ? 100 : dtype == DType::bfloat16 ? 20 : 1e5;
        const double huge = dtype == DType::float16 ? 5e3 : dtype == DType::float64 ? 1e100 : 1e30;
        Doubles center, spread;
        for (int64_t k = 0; k < channels; ++k) {
            const double sd = 0.5 + random_.uniform();
            center.push_back(c_.data == Data::far ? far * sd : c_.data == Data::huge ? 0.5 * huge : random_.normal());
            spread.push_back(c_.data == Data::huge ? huge * sd : c_.data == Data::constant ? 0 : sd);
        }
        for (int64_t e = 0; e < size; ++e) {
            const size_t k = size_t(c_.channel_of(e));
            in_.x.push_back(center[k] + spread[k] * random_.normal());
            in_.residual.push_back(2 * random_.normal());
            in_.dy.push_back(random_.normal());
        }
        special_ = -1;
        if (c_.data == Data::special) {
            special_ = random_.below(channels);
            const double worst[] = {INFINITE, -INFINITE, NOT_A_NUMBER};
            for (int64_t left = 1 + random_.below(3); left > 0; --left) {
                const int64_t n = random_.below(c_.shape.outer), s = random_.below(c_.shape.inner);
                in_.x[size_t((n * channels + special_) * c_.shape.inner + s)] = worst[random_.below(3)];
            }
        }
        round(in_.x, dtype);
        round(in_.residual, dtype);
        round(in_.dy, dtype);
        for (int64_t k = 0; k < channels; ++k) {
            const double sign = random_.one_in(2) ? 1 : -1;
            in_.weight.push_back(c_.weight ? sign * (0.3 + random_.uniform()) : 1);
            in_.bias.push_back(c_.bias ? random_.normal() : 0);
        }
        round(in_.weight, c_.parameters());
        round(in_.bias, c_.parameters());
    }
    static void round(Doubles& values, DType dtype) {
        char bytes[8];
        for (double& v : values) {
            write(bytes, dtype, v);
            v = read(bytes, dtype);
        }
    }
    void keep_from_kinks(const Forward& f) {
        for (size_t i = 0; i < in_.dy.size(); ++i)
            if (near_kink(c_.activation, f.z[i],
                          f.of_y[i] + f.magnitude[i] * 12 * precision_of(c_.shape.dtype).working))
                in_.dy[i] = 0;
    }

    // -- what the kernels are given ------------------------------------------------------------------------------------

    struct Given {
        const Case& c;
        Buffer weight, bias;
        Array<double> mean, m2, rstd, sum_g, sum_gx;

        Given(const Case& c, const Inputs& in)
            : c(c),
              weight(c.shape.channels * width_of(c.parameters()), 0),
              bias(weight.bytes(), 0),
              mean(c.shape.channels),
              m2(c.shape.channels),
              rstd(c.shape.channels),
              sum_g(c.shape.channels),
              sum_gx(c.shape.channels) {
            for (int64_t k = 0; k < c.shape.channels; ++k) {
                write(weight.data() + k * width_of(c.parameters()), c.parameters(), in.weight[size_t(k)]);
                write(bias.data() + k * width_of(c.parameters()), c.parameters(), in.bias[size_t(k)]);
            }
        }
        Affine affine() const {
            return {c.weight ? weight.data() : nullptr, c.bias ? bias.data() : nullptr, c.activation};
        }
        Statistics statistics() const { return {mean.data(), m2.data(), rstd.data()}; }
        Sums sums() const { return {sum_g.data(), sum_gx.data()}; }
        void set_statistics(const Forward& f) {
            for (int64_t k = 0; k < c.shape.channels; ++k) {
                mean[k] = f.mean[size_t(k)];
                rstd[k] = f.rstd[size_t(k)];
            }
        }
        bool guards_untouched() const {
            return weight.guards_untouched() && bias.guards_untouched() && mean.guards_untouched() &&
                   m2.guards_untouched() && rstd.guards_untouched() && sum_g.guards_untouched() &&
                   sum_gx.guards_untouched();
        }
    };

    // -- comparisons ---------------------------------------------------------------------------------------------------

    __attribute__((format(printf, 3, 4))) void fail(const char* phase, const char* format, ...) {
        ++failures;
        const std::lock_guard<std::mutex> hold(report_lock);
        if (!failed_) {
            ++failed_cases;
            std::printf("FAILED %s, seed %llu: %s\n  alone: test_kernels --isa %s --seed %llu\n", kernels_.name,
                        (unsigned long long)c_.seed, c_.describe().c_str(), kernels_.name, (unsigned long long)c_.seed);
        }
        failed_ = true;
        if (++said_ > 8) return;
        va_list arguments;
        va_start(arguments, format);
        std::printf("  %s: ", phase);
        std::vprintf(format, arguments);
        std::printf("\n");
        va_end(arguments);
        std::fflush(stdout);
    }
    void same(const char* phase, const char* what, int64_t at, double found, double exact, double bound) {
        ++compared_;
        if (std::isnan(exact)) {
            if (!std::isnan(found)) fail(phase, "%s[%lld] is %g, not NaN", what, (long long)at, found);
        } else if (std::isinf(exact)) {
            if (found != exact) fail(phase, "%s[%lld] is %g, not %g", what, (long long)at, found, exact);
        } else if (!(std::fabs(found - exact) <= bound)) {
            fail(phase, "%s[%lld] is %.17g, exactly %.17g, off by %.3g of the %.3g allowed", what, (long long)at, found,
                 exact, std::fabs(found - exact), bound);
        }
    }
    // Moments that were merged are NaN where one part has an infinite mean, here as in batchnorm.moments.
    static double infinite_is_nan(double mean) { return std::isinf(mean) ? NOT_A_NUMBER : mean; }
    void outside(const char* phase, const char* what, bool untouched) {
        if (!untouched) fail(phase, "memory outside %s was written", what);
    }
    void unchanged(const char* phase, const char* what, const Tensor& tensor, const Doubles& values) {
        for (int64_t e = 0; e < c_.size(); ++e) {
            const double was = values[size_t(e)], is = tensor[e];
            if (was != is && !(std::isnan(was) && std::isnan(is)))
                return fail(phase, "%s[%lld], an input, was changed", what, (long long)e);
        }
        outside(phase, what, tensor.outside_untouched());
    }

    void check_statistics(const char* phase, const Given& given, const ExactMoments& exact, const Doubles& rstd) {
        for (int64_t k = 0; k < c_.shape.channels; ++k) {
            const size_t i = size_t(k);
            const double var = exact.of_m2[i] / c_.count();
            // the slope of 1/√v is steepest where v is smallest
            const double smallest = std::max(EPS, exact.m2[i] / c_.count() + EPS - var);
            const double of_rstd = 0.5 * var / (smallest * std::sqrt(smallest)) + 4 * EPS64 * rstd[i];
            same(phase, "mean", k, infinite_is_nan(given.mean[k]), infinite_is_nan(exact.mean[i]), exact.of_mean[i]);
            same(phase, "M2", k, given.m2[k], exact.m2[i], exact.of_m2[i]);
            same(phase, "rstd", k, given.rstd[k], rstd[i], of_rstd);
        }
    }

    // -- phases --------------------------------------------------------------------------------------------------------

    void check_moments(const ExactMoments& exact, const Doubles& rstd) {
        Given given(c_, in_);
        const Tensor x(c_, 3, in_.x);
        kernels_.moments(c_.shape, x.view(), given.statistics(), EPS, pool_);
        check_statistics("moments", given, exact, rstd);
        unchanged("moments", "x", x, in_.x);
        outside("moments", "parameters and statistics", given.guards_untouched());
    }

    void check_forward(const char* phase, const Forward& f, const ExactMoments* moments, bool fused, bool in_place) {
        Given given(c_, in_);
        const Tensor x(c_, 3, in_.x), residual(c_, 1, in_.residual), fresh(c_, 5);
        const View none{}, of_residual = c_.residual ? residual.view() : none;
        const Tensor& y = in_place ? x : fresh;
        const Array<uint16_t> bits(words(c_.shape));
        uint16_t* of_bits = c_.residual ? bits.data() : nullptr;
        const int64_t channels = c_.shape.channels;
        Buffer running_mean(channels * width_of(c_.parameters()), 0), running_var(running_mean.bytes(), 0);
        const auto at = [&](const Buffer& buffer, int64_t k) { return buffer.data() + k * width_of(c_.parameters()); };
        for (int64_t k = 0; k < channels; ++k) {
            write(at(running_mean, k), c_.parameters(), 0.25);
            write(at(running_var, k), c_.parameters(), 0.75);
        }
        if (fused) {
            std::atomic<bool> refused{false};
            kernels_.train_forward(c_.shape, x.view(), given.affine(), given.statistics(), EPS,
                                   {running_mean.data(), running_var.data(), MOMENTUM, &refused}, of_residual, y.view(),
                                   of_bits, pool_);
            check_statistics(phase, given, *moments, f.rstd);
            check_running(phase, running_mean, running_var, *moments, refused);
        } else {
            if (moments)
                kernels_.moments(c_.shape, x.view(), given.statistics(), EPS, pool_);
            else
                given.set_statistics(f);
            kernels_.normalize(c_.shape, x.view(), given.affine(), given.statistics(), of_residual, y.view(), of_bits,
                               pool_);
        }
        for (int64_t e = 0; e < c_.size(); ++e) {
            const double z = f.z[size_t(e)], exact = f.y[size_t(e)], found = y[e];
            if (std::isinf(z)) {
                // −∞·0: either limit is as good
                const bool undefined = c_.activation == Activation::hardswish || c_.activation == Activation::silu ||
                                       c_.activation == Activation::gelu;
                if (z > 0 || !undefined) same(phase, "y", e, found, exact, precision_of(c_.shape.dtype).tiny);
            } else {
                same(phase, "y", e, found, exact, f.of_y[size_t(e)]);
            }
        }
        if (of_bits) check_bits(phase, bits, f);
        if (!in_place) unchanged(phase, "x", x, in_.x);
        unchanged(phase, "residual", residual, in_.residual);
        outside(phase, "y", y.outside_untouched());
        outside(phase, "bits", bits.guards_untouched());
        outside(phase, "running statistics", running_mean.guards_untouched() && running_var.guards_untouched());
        outside(phase, "parameters and statistics", given.guards_untouched());
    }

    void check_running(const char* phase, const Buffer& mean, const Buffer& var, const ExactMoments& exact,
                       bool refused) {
        const double n = c_.count(), eps = precision_of(c_.parameters()).working;
        bool expected = false;
        for (int64_t k = 0; k < c_.shape.channels; ++k) {
            const size_t i = size_t(k);
            const double found_mean = read(mean.data() + k * width_of(c_.parameters()), c_.parameters());
            const double found_var = read(var.data() + k * width_of(c_.parameters()), c_.parameters());
            const double batch = exact.m2[i] / (n - 1), moved = 0.9 * 0.75 + MOMENTUM * batch;
            const bool overflow = c_.parameters() == DType::float32 && moved > 3.4028235677973366e38;
            const bool enters = std::isfinite(exact.mean[i]) && std::isfinite(moved) && !overflow;
            expected = expected || (n > 1 && !enters);
            if (n == 1 || !enters) {  // no divisor n − 1, or nothing finite to enter: they stay as they are
                same(phase, "running mean", k, found_mean, 0.25, 0);
                same(phase, "running variance", k, found_var, 0.75, 0);
                continue;
            }
            same(phase, "running mean", k, found_mean, 0.9 * 0.25 + MOMENTUM * exact.mean[i],
                 eps * (0.25 + std::fabs(exact.mean[i])) + exact.of_mean[i]);
            same(phase, "running variance", k, found_var, moved, eps * (0.75 + batch) + exact.of_m2[i] / (n - 1));
        }
        same(phase, "a channel was refused", 0, refused, expected, 0);
    }

    void check_bits(const char* phase, const Array<uint16_t>& bits, const Forward& f) {
        const int64_t run = bit_run(c_.shape), width = per_word(c_.shape);
        for (int64_t e = 0; e < c_.size(); ++e) {
            const double z = f.z[size_t(e)];
            if (std::isnan(z) || std::fabs(z) <= f.of_y[size_t(e)]) continue;
            const bool six = c_.activation == Activation::relu6;
            if (six && std::fabs(z - 6) <= f.of_y[size_t(e)] + 1e-5) continue;
            const int64_t at = e / run * words_per_run(c_.shape) + e % run / width;
            const bool found = bits[at] >> (e % run % width) & 1, exact = z > 0 && !(six && z >= 6);
            ++compared_;
            if (found != exact) fail(phase, "bit %lld is %d for z = %g", (long long)e, int(found), z);
        }
    }

    // The bits as they would have been kept, from the exact z.
    Array<uint16_t> exact_bits(const Forward& f) const {
        Array<uint16_t> bits(words(c_.shape));
        const int64_t run = bit_run(c_.shape), width = per_word(c_.shape);
        for (int64_t e = 0; e < c_.size(); ++e) {
            const int64_t at = e / run * words_per_run(c_.shape) + e % run / width;
            const double z = f.z[size_t(e)];
            const unsigned bit = 1u << (e % run % width);
            const bool passes = z > 0 && !(c_.activation == Activation::relu6 && z >= 6);
            bits[at] = uint16_t(passes ? bits[at] | bit : bits[at] & ~bit);
        }
        return bits;
    }

    void check_backward(const char* phase, const Forward& f, const Backward& exact, bool training, bool fused,
                        bool over_dy) {
        const Tensor x(c_, 3, in_.x), residual(c_, 1, in_.residual);
        const Array<uint16_t> bits = exact_bits(f);
        const bool by_bits = c_.residual && (c_.activation == Activation::relu || c_.activation == Activation::relu6 ||
                                             c_.activation == Activation::leaky_relu);
        // once with the bits where they may be kept, and without, from the residual
        for (int with_bits = 0; with_bits <= int(by_bits); ++with_bits) {
            const View none{};
            const bool reads_residual = c_.residual && !with_bits && c_.activation != Activation::none;
            const Saved saved{
                x.view(), with_bits ? bits.data() : nullptr, reads_residual ? residual.view() : none, false, none,
                nullptr};
            call_backward(phase, f, exact, saved, training, fused, over_dy);
        }
        unchanged(phase, "x", x, in_.x);
        unchanged(phase, "residual", residual, in_.residual);
    }

    void call_backward(const char* phase, const Forward& f, const Backward& exact, const Saved& saved, bool training,
                       bool fused, bool over_dy) {
        Given given(c_, in_);
        given.set_statistics(f);
        const Tensor dy(c_, 2, in_.dy), fresh(c_, 5), dresidual(c_, 4);
        const Tensor& dx = over_dy ? dy : fresh;
        const bool wants_residual = c_.residual && c_.activation != Activation::none;
        const View none{}, of_residual = wants_residual ? dresidual.view() : none;
        if (fused) {
            kernels_.train_backward(c_.shape, dy.view(), saved, given.affine(), given.statistics(), given.sums(),
                                    dx.view(), of_residual, pool_);
        } else {
            Sums sums{};
            if (training) {
                sums = given.sums();
                kernels_.backward_reduce(c_.shape, dy.view(), saved, given.affine(), given.statistics(), sums, pool_);
            }
            kernels_.backward_input(c_.shape, dy.view(), saved, given.affine(), given.statistics(), sums, c_.count(),
                                    dx.view(), of_residual, pool_);
        }
        for (int64_t k = 0; training && k < c_.shape.channels; ++k) {
            if (k == special_) continue;
            same(phase, "sum of g", k, given.sum_g[k], exact.sum_g[size_t(k)], exact.of_sum_g[size_t(k)]);
            same(phase, "sum of g x^", k, given.sum_gx[k], exact.sum_gx[size_t(k)], exact.of_sum_gx[size_t(k)]);
        }
        for (int64_t e = 0; e < c_.size(); ++e) {
            const size_t i = size_t(e);
            if (c_.channel_of(e) == special_) {  // the batch's statistics are NaN there, and with them every gradient
                if (training) same(phase, "dx", e, dx[e], NOT_A_NUMBER, 0);
                continue;
            }
            same(phase, "dx", e, dx[e], exact.dx[i], exact.of_dx[i]);
            if (wants_residual) same(phase, "dresidual", e, dresidual[e], exact.dresidual[i], exact.of_dresidual[i]);
        }
        if (!over_dy) unchanged(phase, "dy", dy, in_.dy);
        outside(phase, "dx", dx.outside_untouched());
        outside(phase, "dresidual", dresidual.outside_untouched());
        outside(phase, "parameters, statistics and sums", given.guards_untouched());
    }

    // In place: y over x, and the backward pass from y; of planes, a channel in three cannot be recovered and is kept.
    void check_recovering() {
        const char* phase = "backward in place";
        const Inputs before = in_;
        const int64_t channels = c_.shape.channels;
        if (c_.shape.layout == Layout::planes && c_.weight) {
            for (int64_t k = 0; k < channels; k += 3) {
                if (c_.bias && k % 2)
                    in_.bias[size_t(k)] = 16;  // more than 8 times γ
                else
                    in_.weight[size_t(k)] = 0;
            }
        }
        Given given(c_, in_);
        const ExactMoments moments = moments_of(c_, in_);
        Doubles rstd;
        for (double m2 : moments.m2) rstd.push_back(1 / std::sqrt(m2 / c_.count() + EPS));
        const Forward f = forward_of(c_, in_, moments.mean, rstd, &moments);
        in_.dy = before.dy;
        keep_from_kinks(f);

        const Array<uint8_t> marks(channels);
        const int64_t marked = mark_unrecoverable(c_.shape, given.affine(), marks.data());
        std::vector<bool> recovered;
        std::vector<int64_t> kept_channels;
        const Array<int32_t> slot(channels);
        for (int64_t k = 0; k < channels; ++k) {
            const double w = std::fabs(in_.weight[size_t(k)]), b = std::fabs(in_.bias[size_t(k)]);
            recovered.push_back(w > 0 && b <= 8 * w);
            if (recovered.back() == bool(marks[k])) fail(phase, "channel %lld is marked wrongly", (long long)k);
            slot[k] = recovered.back() ? -1 : int32_t(kept_channels.size());
            if (!recovered.back()) kept_channels.push_back(k);
        }
        if (marked != int64_t(kept_channels.size())) fail(phase, "%lld channels are marked", (long long)marked);
        if (c_.shape.layout != Layout::planes && marked > 0) {  // only planes keep some
            in_ = before;
            return;
        }
        // the kept channels as planes of their own
        Case of_kept = c_;
        of_kept.shape.channels = std::max<int64_t>(1, marked);
        Tensor kept(of_kept, 6);
        Doubles kept_values(size_t(of_kept.size()), 0.0);
        for (int64_t e = 0; marked > 0 && e < of_kept.size(); ++e) {
            const int64_t s = e % c_.shape.inner, n = e / c_.shape.inner / marked;
            const int64_t k = kept_channels[size_t(e / c_.shape.inner % marked)];
            kept_values[size_t(e)] = in_.x[size_t((n * channels + k) * c_.shape.inner + s)];
        }
        kept.fill(kept_values);

        const Tensor y(c_, 3, in_.x);
        const View none{};
        given.set_statistics(f);
        kernels_.normalize(c_.shape, y.view(), given.affine(), given.statistics(), none, y.view(), nullptr, pool_);
        const Doubles stored = y.values();
        const Saved saved{y.view(), nullptr, none, true, marked ? kept.view() : none, marked ? slot.data() : nullptr};
        const Backward exact = backward_of(c_, in_, f, true, recovered);
        for (const bool fused : {true, false})
            call_backward(fused ? "train_backward in place" : "backward_reduce, backward_input in place", f, exact,
                          saved, true, fused, fused);
        call_backward("backward_input in place in eval", f, backward_of(c_, in_, f, false, recovered), saved, false,
                      false, false);
        unchanged(phase, "y", y, stored);
        if (marked) outside(phase, "kept", kept.outside_untouched());
        in_ = before;
    }

public:
    ~Run() { comparisons += compared_; }

private:
    const Case c_;
    const Kernels& kernels_;
    const Pool pool_;
    Random random_{c_.seed + 1000003};
    Inputs in_;
    int64_t special_ = -1, compared_ = 0;
    bool failed_ = false;
    int said_ = 0;
};

// -- moments of each sample ------------------------------------------------------------------------------------------

constexpr uint64_t SAMPLE_CASES = 1500;

struct SampleCase {
    uint64_t seed;
    SampleRows rows;
    int64_t span;  // elements, gaps included
    int threads;
    enum Data : int { usual, far, outlier_first, constant, huge, infinite } data;
};

SampleCase sample_case_of(uint64_t seed) {
    Random random{seed + 77};
    SampleCase c{};
    c.seed = seed;
    SampleRows& r = c.rows;
    r.dtype = DType(random.below(4));
    r.samples = 1 + random.below(4);
    r.channels = random.of<5>({1, 2, 7, 63, 130});
    const bool whole = random.one_in(2);
    r.rows = whole ? 1 : 1 + random.below(40);
    r.width = whole ? random.of<8>({1, 9, 16, 49, 196, 784, 1025, 2300}) : random.of<6>({1, 8, 14, 28, 57, 112});
    r.step = 1 + random.below(r.rows);
    r.first = random.below(100);
    r.row_stride = r.width + random.below(3);
    r.channel_stride = r.rows * r.row_stride + random.below(3);
    r.sample_stride = r.channels * r.channel_stride + random.below(3);
    c.span =
        (r.samples - 1) * r.sample_stride + (r.channels - 1) * r.channel_stride + (r.rows - 1) * r.row_stride + r.width;
    c.threads = int(random.of<3>({1, 2, 5}));
    c.data = SampleCase::Data(random.below(6));
    return c;
}

// A value of a run, as it is meant: `first` of those that are looked at.
double sample_value(const SampleCase& c, Random& random, bool first) {
    switch (c.data) {
        case SampleCase::far: return 300 + random.normal();
        case SampleCase::outlier_first: return first ? 1000 : random.normal();
        case SampleCase::constant: return 0.75;
        case SampleCase::huge: return random.normal() * (c.rows.dtype == DType::float16 ? 1e4 : 1e30);
        case SampleCase::infinite: return random.one_in(300) ? INFINITE : random.normal();
        default: return 0.3 + random.normal();
    }
}

// What one sample has in one channel, and how far the kernel may be off: 1024 values in 16 lanes, twice as wide in the
// sums where the first value of all is taken off each.
struct SampleMoments {
    double mean = 0, variance = 0, of_mean = 0, of_variance = 0;

    SampleMoments(const Doubles& values, DType dtype) {
        const double n = double(values.size()), working = precision_of(dtype).working;
        Sum sum, square;
        for (double v : values) sum.add(v);
        mean = sum.value() / n;
        for (double v : values) square.add((v - mean) * (v - mean));
        variance = square.value() / n;
        const double about = 17 * variance + std::pow(working * mean, 2);
        of_mean = 64 * working * std::sqrt(about) + 8 * EPS64 * std::fabs(mean);
        of_variance = 64 * working * about + of_mean * of_mean + 16 * EPS64 * std::fabs(mean) * std::sqrt(variance);
    }
};

bool agree(double found, double exact, double bound) {
    ++comparisons;
    if (!std::isfinite(exact)) return !std::isfinite(found);
    return std::fabs(found - exact) <= bound;
}

void run_sample_case(const SampleCase& c) {
    const SampleRows& r = c.rows;
    Random random{c.seed + 1000003};
    const int64_t width = width_of(r.dtype), results = r.samples * r.channels;
    Buffer x(c.span * width, 0);
    Array<double> mean(results), variance(results);
    std::vector<Doubles> looked_at;
    for (int64_t n = 0; n < r.samples; ++n)
        for (int64_t k = 0; k < r.channels; ++k) {
            Doubles values;
            for (int64_t row = (r.first + n) % r.step; row < r.rows; row += r.step)
                for (int64_t i = 0; i < r.width; ++i) {
                    const int64_t at = n * r.sample_stride + k * r.channel_stride + row * r.row_stride + i;
                    write(x.data() + at * width, r.dtype, sample_value(c, random, values.empty()));
                    values.push_back(read(x.data() + at * width, r.dtype));
                }
            looked_at.push_back(values);
        }
    SampleRows given = r;
    given.data = x.data();
    active_kernels().sample_moments(given, mean.data(), variance.data(), pool_of(c.threads));
    for (int64_t k = 0; k < results; ++k) {
        const SampleMoments exact(looked_at[size_t(k)], r.dtype);
        if (agree(mean[k], exact.mean, exact.of_mean) && agree(variance[k], exact.variance, exact.of_variance))
            continue;
        std::lock_guard<std::mutex> lock(report_lock);
        std::printf("FAILED samples, seed %llu (%s): mean %.17g, not %.17g ± %.2g; variance %.17g, not %.17g ± %.2g\n",
                    (unsigned long long)c.seed, name_of(r.dtype), mean[k], exact.mean, exact.of_mean, variance[k],
                    exact.variance, exact.of_variance);
        ++failures;
        ++failed_cases;
        return;
    }
    if (!x.guards_untouched() || !mean.guards_untouched() || !variance.guards_untouched()) {
        std::printf("FAILED samples, seed %llu: written outside\n", (unsigned long long)c.seed);
        ++failures;
        ++failed_cases;
    }
}

// -- all cases -------------------------------------------------------------------------------------------------------

struct Options {
    std::string isa;
    uint64_t every = 1;
    int64_t seed = -1;
};

void run_case(const Case& c) { Run(c).all(); }

// Two callers at once, as Python's threads would be without its lock, while a third one changes the instruction set.
void run_at_once(const std::vector<std::string>& isas, uint64_t every) {
    const uint64_t step = 97 * every;
    std::atomic<int> running{2};
    const auto caller = [&](uint64_t first) {
        for (uint64_t seed = first; seed < CASES; seed += step) run_case(case_of(seed));
        --running;
    };
    std::thread one(caller, uint64_t(0)), two(caller, uint64_t(48));
    for (size_t k = 0; running > 0; ++k) {
        use_isa(isas[k % isas.size()]);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    one.join();
    two.join();
}

int run(const Options& options) {
    const std::vector<std::string> available = available_isas();
    std::vector<std::string> isas;
    for (const std::string& isa : available)
        if (options.isa.empty() || options.isa == isa) isas.push_back(isa);
    if (isas.empty()) {
        std::printf("no instruction set %s here\n", options.isa.c_str());
        return 2;
    }
    const int64_t cache = stream_bytes;
    const auto stated = [](const char* what, auto&& body) {
        const int64_t before = comparisons;
        const int failed_before = failed_cases;
        const auto start = std::chrono::steady_clock::now();
        const uint64_t cases = body();
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        std::printf("%-10s %6llu cases, %10lld comparisons, %3d cases failed, %6.1f s\n", what,
                    (unsigned long long)cases, (long long)(comparisons - before), failed_cases - failed_before,
                    seconds);
        std::fflush(stdout);
    };
    for (const std::string& isa : isas) {
        if (!use_isa(isa) || isa != active_kernels().name) {
            std::printf("FAILED use_isa(%s)\n", isa.c_str());
            return 1;
        }
        stated(isa.c_str(), [&] {
            uint64_t cases = 0;
            const uint64_t first = options.seed < 0 ? 0 : uint64_t(options.seed);
            const uint64_t last = options.seed < 0 ? CASES : first + 1;
            // cases follow each other in the order of dtype and layout: steps must not keep to one of them
            for (uint64_t seed = first; seed < last; seed += options.every, ++cases) {
                const Case c = case_of(seed);
                stream_bytes = c.streaming ? 0 : cache;
                run_case(c);
            }
            return cases;
        });
        stated("  samples", [&] {
            uint64_t cases = 0;
            for (uint64_t seed = 0; options.seed < 0 && seed < SAMPLE_CASES; seed += options.every, ++cases)
                run_sample_case(sample_case_of(seed));
            return cases;
        });
    }
    stream_bytes = cache;
    if (use_isa("none such")) {
        std::printf("FAILED use_isa of an instruction set that is not there\n");
        return 1;
    }
    const uint64_t at_once_every = 1 + options.every / 8, step = 97 * at_once_every;  // few as they are
    if (options.seed < 0)
        stated("at once", [&] {
            run_at_once(isas, at_once_every);
            return (CASES + step - 1) / step + (CASES - 48 + step - 1) / step;
        });
    if (failures > 0) {
        std::printf("%d cases failed, in %lld places\n", int(failed_cases), (long long)failures);
        return 1;
    }
    std::printf("all passed\n");
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string name = arguments[i];
        const char* value = i + 1 < count ? arguments[++i] : nullptr;
        if (value && name == "--isa")
            options.isa = value;
        else if (value && name == "--every")
            options.every = std::max<uint64_t>(1, std::strtoull(value, nullptr, 10));
        else if (value && name == "--seed")
            options.seed = int64_t(std::strtoull(value, nullptr, 10));
        else {
            std::printf("usage: test_kernels [--isa NAME] [--every N] [--seed I]\n");
            return 2;
        }
    }
    return run(options);
}
