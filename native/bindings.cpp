// Python's view of the kernels: addresses, sizes and strides in, nothing out. No arithmetic here.
//
// The kernels run on the caller's thread pool: `set_parallel_for` takes the address of torch's
// torch_parallel_for(begin, end, grain, task, context), so that nothing is linked against torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <utility>

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

struct Call {
    Shape shape;
    Affine affine;
    Statistics statistics;
    Pool pool;
};

}  // namespace

namespace nanobind::detail {
template <>
struct type_caster<View> {
    NB_TYPE_CASTER(View, const_name("tuple[int, int, int]"))
    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        if (!PyTuple_Check(source.ptr()) || PyTuple_Size(source.ptr()) != 3) return false;
        const auto item = [&](Py_ssize_t i) { return PyTuple_GetItem(source.ptr(), i); };
        value.data = static_cast<char*>(PyLong_AsVoidPtr(item(0)));
        value.outer_stride = PyLong_AsLongLong(item(1));
        value.channel_stride = PyLong_AsLongLong(item(2));
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
};
}  // namespace nanobind::detail

NB_MODULE(_native, m) {
    m.doc() = "Native kernels of batch normalization; batchnorm.kernels.native is how they are called.";

    m.def("isas", &available_isas, "The instruction sets that this build has and this machine runs, the best last.");
    m.def("isa", [] { return std::string(active_kernels().name); }, "The instruction set in use.");
    m.def("use_isa", &use_isa, "name"_a, "Use another instruction set, in all threads; False if it is not available.");
    m.def(
        "set_parallel_for", [](uintptr_t address) { parallel_for = reinterpret_cast<ParallelFor>(address); },
        "address"_a, "Run on the thread pool behind this function; 0: on the calling thread.");

    nb::class_<Call>(m, "Call", "What all phases of one call share: sizes, parameters and statistics, by address.")
        .def(
            "__init__",
            [](Call* call, int layout, int dtype, int64_t outer, int64_t channels, int64_t inner, uintptr_t weight,
               uintptr_t bias, int activation, uintptr_t statistics, int threads) {
                double* per_channel = at<double>(statistics);
                new (call) Call{{Layout(layout), DType(dtype), outer, channels, inner},
                                {at<void>(weight), at<void>(bias), Activation(activation)},
                                {per_channel, per_channel + channels, per_channel + 2 * channels},
                                {run_on_pool, threads}};
            },
            "layout"_a, "dtype"_a, "outer"_a, "channels"_a, "inner"_a, "weight"_a, "bias"_a, "activation"_a,
            "statistics"_a, "threads"_a)
        .def("bit_words", [](const Call& call) { return words(call.shape); })
        .def("bit_run", [](const Call& call) { return bit_run(call.shape); })
        .def("bits_per_word", [](const Call& call) { return per_word(call.shape); })
        .def(
            "mark_unrecoverable",
            [](const Call& call, uintptr_t marks) {
                return mark_unrecoverable(call.shape, call.affine, at<uint8_t>(marks));
            },
            "marks"_a)
        .def(
            "take_stored",
            [](const Call& call, uintptr_t mean, uintptr_t variance, double eps) {
                take_stored(call.shape, at<void>(mean), at<void>(variance), eps, call.statistics);
            },
            "mean"_a, "variance"_a, "eps"_a)
        .def(
            "moments",
            [](const Call& call, View x, double eps) {
                active_kernels().moments(call.shape, x, call.statistics, eps, call.pool);
            },
            "x"_a, "eps"_a, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "normalize",
            [](const Call& call, View x, View residual, View y, uintptr_t bits) {
                active_kernels().normalize(call.shape, x, call.affine, call.statistics, residual, y, at<uint16_t>(bits),
                                           call.pool);
            },
            "x"_a, "residual"_a, "y"_a, "bits"_a, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "train_forward",
            [](const Call& call, View x, double eps, uintptr_t running_mean, uintptr_t running_var, double momentum,
               View residual, View y, uintptr_t bits) {
                active_kernels().train_forward(call.shape, x, call.affine, call.statistics, eps,
                                               {at<void>(running_mean), at<void>(running_var), momentum}, residual, y,
                                               at<uint16_t>(bits), call.pool);
            },
            "x"_a, "eps"_a, "running_mean"_a, "running_var"_a, "momentum"_a, "residual"_a, "y"_a, "bits"_a,
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "backward_reduce",
            [](const Call& call, View dy, View x, uintptr_t bits, View residual, bool in_place, View kept,
               uintptr_t slot, uintptr_t sums) {
                const Saved saved{x, at<uint16_t>(bits), residual, in_place, kept, at<int32_t>(slot)};
                active_kernels().backward_reduce(call.shape, dy, saved, call.affine, call.statistics,
                                                 {at<double>(sums), at<double>(sums) + call.shape.channels}, call.pool);
            },
            "dy"_a, "x"_a, "bits"_a, "residual"_a, "in_place"_a, "kept"_a, "slot"_a, "sums"_a,
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "backward_input",
            [](const Call& call, View dy, View x, uintptr_t bits, View residual, bool in_place, View kept,
               uintptr_t slot, uintptr_t sums, double count, View dx, View dresidual) {
                const Saved saved{x, at<uint16_t>(bits), residual, in_place, kept, at<int32_t>(slot)};
                double* of_dy = at<double>(sums);
                active_kernels().backward_input(call.shape, dy, saved, call.affine, call.statistics,
                                                {of_dy, of_dy ? of_dy + call.shape.channels : nullptr}, count, dx,
                                                dresidual, call.pool);
            },
            "dy"_a, "x"_a, "bits"_a, "residual"_a, "in_place"_a, "kept"_a, "slot"_a, "sums"_a, "count"_a, "dx"_a,
            "dresidual"_a, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "train_backward",
            [](const Call& call, View dy, View x, uintptr_t bits, View residual, bool in_place, View kept,
               uintptr_t slot, uintptr_t sums, View dx, View dresidual) {
                const Saved saved{x, at<uint16_t>(bits), residual, in_place, kept, at<int32_t>(slot)};
                active_kernels().train_backward(call.shape, dy, saved, call.affine, call.statistics,
                                                {at<double>(sums), at<double>(sums) + call.shape.channels}, dx,
                                                dresidual, call.pool);
            },
            "dy"_a, "x"_a, "bits"_a, "residual"_a, "in_place"_a, "kept"_a, "slot"_a, "sums"_a, "dx"_a, "dresidual"_a,
            nb::call_guard<nb::gil_scoped_release>());

    m.def(
        "set_stream_bytes", [](int64_t bytes) { return std::exchange(stream_bytes, bytes); }, "bytes"_a,
        "Let outputs of more bytes go around the caches; returns the limit that held. For tests and measurements.");
    m.def(
        "advise_huge_pages", [](uintptr_t data, int64_t bytes) { advise_huge_pages(at<void>(data), bytes); }, "data"_a,
        "bytes"_a);
}
