// Python's view of the kernels: addresses, sizes and strides in, nothing out. No arithmetic here.
//
// The kernels run on the caller's thread pool: `set_parallel_for` takes the address of torch's
// torch_parallel_for(begin, end, grain, task, context), so that nothing is linked against torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "digits.hpp"
#include "kernels.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace batchnorm;

using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Task task, void* context);
std::atomic<ParallelFor> parallel_for{nullptr};

void run_on_pool(int64_t n, int64_t grain, Task task, void* context) {
    const ParallelFor run = parallel_for.load(std::memory_order_relaxed);
    if (!run || run(0, n, grain, task, context) != 0) task(0, n, context);
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A batch has entered the running statistics in all channels, or was refused in some; an address of 0: nobody counts.
void count_batch(bool entered, uintptr_t batches, uintptr_t refused) {
    const uintptr_t counter = entered ? batches : refused;
    if (counter) ++*at<int64_t>(counter);
}

// What all calls on inputs of one size and layout share.
struct Plan {
    Shape shape;
    Activation activation;
};

// What one call has beside its tensors: parameters and statistics, by address, and threads.
struct Parameters {
    uintptr_t weight, bias, statistics;
    int threads;

    Affine affine(const Plan& plan) const { return {at<void>(weight), at<void>(bias), plan.activation}; }
    Statistics of(const Plan& plan) const {
        double* first = at<double>(statistics);
        return {first, first + plan.shape.channels, first + 2 * plan.shape.channels};
    }
    Pool pool() const { return {run_on_pool, threads}; }
};

// dy, and what is left of the forward pass: x, bits, residual, whether in place, the kept channels and their slots.
struct Backward {
    View dy;
    Saved saved;
};

Sums sums_at(uintptr_t address, const Plan& plan) {
    double* of_dy = at<double>(address);
    return {of_dy, of_dy ? of_dy + plan.shape.channels : nullptr};
}

// The gradients of the parameters, in their dtype; 0: not wanted.
void put_gradients(const Plan& plan, const Sums& sums, uintptr_t of_weight, uintptr_t of_bias) {
    const auto put = [&](uintptr_t address, const double* values) {
        if (!address) return;
        const int64_t n = plan.shape.channels;
        if (plan.shape.dtype == DType::float64)
            std::copy_n(values, n, at<double>(address));
        else
            std::transform(values, values + n, at<float>(address), [](double v) { return float(v); });
    };
    put(of_weight, sums.dy_xhat);
    put(of_bias, sums.dy);
}

}  // namespace

// Tuples of numbers become these; anything else is a TypeError.
namespace nanobind::detail {
template <class Body>
bool from_tuple(handle source, Py_ssize_t size, Body&& body) noexcept {
    if (!PyTuple_Check(source.ptr()) || PyTuple_Size(source.ptr()) != size) return false;
    body([&](Py_ssize_t i) { return PyTuple_GetItem(source.ptr(), i); });
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
}
inline bool to_view(handle source, View& view) noexcept {
    return from_tuple(source, 3, [&](auto&& item) {
        view.data = static_cast<char*>(PyLong_AsVoidPtr(item(0)));
        view.outer_stride = PyLong_AsLongLong(item(1));
        view.channel_stride = PyLong_AsLongLong(item(2));
    });
}

template <>
struct type_caster<View> {
    NB_TYPE_CASTER(View, const_name("tuple[int, int, int]"))
    bool from_python(handle source, uint8_t, cleanup_list*) noexcept { return to_view(source, value); }
};

template <>
struct type_caster<SampleRows> {
    NB_TYPE_CASTER(SampleRows, const_name("tuple[int, int, int, int, int, int, int, int]"))
    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        int64_t* const places[] = {&value.samples,       &value.channels,       &value.rows,       &value.width,
                                   &value.sample_stride, &value.channel_stride, &value.row_stride, &value.step};
        return from_tuple(source, 8, [&](auto&& item) {
            for (Py_ssize_t i = 0; i < 8; ++i) *places[i] = PyLong_AsLongLong(item(i));
        });
    }
};

template <>
struct type_caster<Parameters> {
    NB_TYPE_CASTER(Parameters, const_name("tuple[int, int, int, int]"))
    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        return from_tuple(source, 4, [&](auto&& item) {
            value.weight = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(item(0)));
            value.bias = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(item(1)));
            value.statistics = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(item(2)));
            value.threads = int(PyLong_AsLong(item(3)));
        });
    }
};

template <>
struct type_caster<Backward> {
    NB_TYPE_CASTER(Backward, const_name("tuple[View, View, int, View, bool, View, int]"))
    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        bool views = true;
        const bool rest = from_tuple(source, 7, [&](auto&& item) {
            views = to_view(item(0), value.dy) && to_view(item(1), value.saved.x) &&
                    to_view(item(3), value.saved.residual) && to_view(item(5), value.saved.kept);
            value.saved.bits = static_cast<uint16_t*>(PyLong_AsVoidPtr(item(2)));
            value.saved.in_place = PyObject_IsTrue(item(4)) == 1;
            value.saved.slot = static_cast<int32_t*>(PyLong_AsVoidPtr(item(6)));
        });
        return views && rest;
    }
};
}  // namespace nanobind::detail

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // plans are cached until the process ends
    m.doc() = "Native kernels of batch normalization; batchnorm.kernels.native is how they are called.";

    // library.py asks for this number: another one wherever a name, an argument or a meaning in this file changes
    m.attr("interface") = 1;

    m.def("isas", &available_isas, "The instruction sets that this build has and this machine runs, the best last.");
    m.def("isa", [] { return std::string(active_kernels().name); }, "The instruction set in use.");
    m.def("use_isa", &use_isa, "name"_a, "Use another instruction set, in all threads; False if it is not available.");
    m.def(
        "set_parallel_for", [](uintptr_t address) { parallel_for = reinterpret_cast<ParallelFor>(address); },
        "address"_a, "Run on the thread pool behind this function; 0: on the calling thread.");

    const auto free = nb::call_guard<nb::gil_scoped_release>();
    nb::class_<Plan>(m, "Plan", "What all calls on inputs of one size and layout share; the calls themselves.")
        .def(
            "__init__",
            [](Plan* plan, int layout, int dtype, int64_t outer, int64_t channels, int64_t inner, int activation,
               double slope) {
                new (plan) Plan{{Layout(layout), DType(dtype), outer, channels, inner},
                                Activation(Activation::Function(activation), slope)};
            },
            "layout"_a, "dtype"_a, "outer"_a, "channels"_a, "inner"_a, "activation"_a, "slope"_a = 0.01)
        .def("bit_words", [](const Plan& plan) { return words(plan.shape); })
        .def("bit_run", [](const Plan& plan) { return bit_run(plan.shape); })
        .def("bits_per_word", [](const Plan& plan) { return per_word(plan.shape); })
        .def(
            "mark_unrecoverable",
            [](const Plan& plan, uintptr_t weight, uintptr_t bias, uintptr_t marks) {
                std::vector<uint8_t> scratch(marks ? 0 : plan.shape.channels);
                return mark_unrecoverable(plan.shape, {at<void>(weight), at<void>(bias), plan.activation},
                                          marks ? at<uint8_t>(marks) : scratch.data());
            },
            "weight"_a, "bias"_a, "marks"_a)
        .def(
            "moments",
            [](const Plan& plan, View x, Parameters p, double eps) {
                active_kernels().moments(plan.shape, x, p.of(plan), eps, p.pool());
            },
            "x"_a, "parameters"_a, "eps"_a, free)
        .def(
            "normalize",
            [](const Plan& plan, View x, View residual, View y, uintptr_t bits, Parameters p) {
                active_kernels().normalize(plan.shape, x, p.affine(plan), p.of(plan), residual, y, at<uint16_t>(bits),
                                           p.pool());
            },
            "x"_a, "residual"_a, "y"_a, "bits"_a, "parameters"_a, free)
        .def(
            "evaluate",
            [](const Plan& plan, View x, View residual, View y, uintptr_t bits, Parameters p, double eps,
               uintptr_t running_mean, uintptr_t running_var) {
                take_stored(plan.shape, at<void>(running_mean), at<void>(running_var), eps, p.of(plan));
                active_kernels().normalize(plan.shape, x, p.affine(plan), p.of(plan), residual, y, at<uint16_t>(bits),
                                           p.pool());
            },
            "x"_a, "residual"_a, "y"_a, "bits"_a, "parameters"_a, "eps"_a, "running_mean"_a, "running_var"_a, free)
        .def(
            "train_forward",
            [](const Plan& plan, View x, View residual, View y, uintptr_t bits, Parameters p, double eps,
               uintptr_t running_mean, uintptr_t running_var, double momentum, uintptr_t batches, uintptr_t refusals) {
                std::atomic<bool> refused{false};
                active_kernels().train_forward(plan.shape, x, p.affine(plan), p.of(plan), eps,
                                               {at<void>(running_mean), at<void>(running_var), momentum, &refused},
                                               residual, y, at<uint16_t>(bits), p.pool());
                count_batch(!refused, batches, refusals);
            },
            "x"_a, "residual"_a, "y"_a, "bits"_a, "parameters"_a, "eps"_a, "running_mean"_a, "running_var"_a,
            "momentum"_a, "batches"_a, "refusals"_a, free)
        .def(
            "backward_reduce",
            [](const Plan& plan, const Backward& b, Parameters p, uintptr_t sums) {
                active_kernels().backward_reduce(plan.shape, b.dy, b.saved, p.affine(plan), p.of(plan),
                                                 sums_at(sums, plan), p.pool());
            },
            "backward"_a, "parameters"_a, "sums"_a, free)
        .def(
            "backward_input",
            [](const Plan& plan, const Backward& b, Parameters p, uintptr_t sums, double count, View dx,
               View dresidual) {
                active_kernels().backward_input(plan.shape, b.dy, b.saved, p.affine(plan), p.of(plan),
                                                sums_at(sums, plan), count, dx, dresidual, p.pool());
            },
            "backward"_a, "parameters"_a, "sums"_a, "count"_a, "dx"_a, "dresidual"_a, free)
        .def(
            "train_backward",
            [](const Plan& plan, const Backward& b, Parameters p, uintptr_t sums, View dx, View dresidual,
               uintptr_t of_weight, uintptr_t of_bias) {
                std::vector<double> scratch(sums ? 0 : 2 * plan.shape.channels);
                const Sums found = sums_at(sums ? sums : reinterpret_cast<uintptr_t>(scratch.data()), plan);
                active_kernels().train_backward(plan.shape, b.dy, b.saved, p.affine(plan), p.of(plan), found, dx,
                                                dresidual, p.pool());
                put_gradients(plan, found, of_weight, of_bias);
            },
            "backward"_a, "parameters"_a, "sums"_a, "dx"_a, "dresidual"_a, "of_weight"_a, "of_bias"_a, free);

    m.def(
        "take_finite",
        [](int dtype, int64_t channels, uintptr_t new_mean, uintptr_t new_var, uintptr_t mean, uintptr_t var,
           uintptr_t batches, uintptr_t refusals) {
            count_batch(take_finite(DType(dtype), channels, at<void>(new_mean), at<void>(new_var), at<void>(mean),
                                    at<void>(var)),
                        batches, refusals);
        },
        "dtype"_a, "channels"_a, "new_mean"_a, "new_var"_a, "mean"_a, "var"_a, "batches"_a, "refusals"_a,
        "Take new running statistics but where they are not finite, and count the batch as entered or as refused.");
    m.def(
        "digits_lost",
        [](int dtype, int64_t channels, uintptr_t new_mean, uintptr_t new_var, uintptr_t mean, uintptr_t var,
           double momentum, double ratio) {
            return digits_lost(DType(dtype), channels, at<void>(new_mean), at<void>(new_var), at<void>(mean),
                               at<void>(var), momentum, ratio);
        },
        "dtype"_a, "channels"_a, "new_mean"_a, "new_var"_a, "mean"_a, "var"_a, "momentum"_a, "ratio"_a,
        "Whether a batch's mean is more than ratio standard deviations from 0 in a channel, told by a step.");
    m.def(
        "sample_moments",
        [](uintptr_t x, int dtype, SampleRows rows, int64_t first, uintptr_t mean, uintptr_t variance, int threads) {
            rows.dtype = DType(dtype);
            rows.data = at<char>(x);
            rows.first = first;
            active_kernels().sample_moments(rows, at<double>(mean), at<double>(variance), {run_on_pool, threads});
        },
        "x"_a, "dtype"_a, "rows"_a, "first"_a, "mean"_a, "variance"_a, "threads"_a, free,
        "Mean and variance of each sample and channel over the rows r ≡ first + n (mod step).");
    m.def(
        "set_stream_bytes", [](int64_t bytes) { return std::exchange(stream_bytes, bytes); }, "bytes"_a,
        "Let outputs of more bytes go around the caches; returns the limit that held. For tests and measurements.");
    m.def(
        "advise_huge_pages", [](uintptr_t data, int64_t bytes) { advise_huge_pages(at<void>(data), bytes); }, "data"_a,
        "bytes"_a);
}
