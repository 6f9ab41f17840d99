// Channel-major planes: every channel's values lie in runs of `inner` contiguous elements, one for each sample.
//
// A thread takes a group of neighbouring channels, so many that a sample's runs make a good stretch of memory, and
// finishes it in two passes, statistics and then the result, while the group's values are still in its cache. The second
// pass goes through the samples backwards: what was read last is hottest. With too few channels for that, samples are
// shared out instead, and the passes wait for each other.

template <class T>
struct Planes {
    static constexpr int64_t block = 512;     // elements of a channel whose moments are taken in the working precision
    static constexpr int64_t stretch = 8192;  // bytes of a sample's runs in a group of channels
    static constexpr int64_t unit = 32 * block;  // elements that are shared out when there are few channels

    int64_t outer, channels, inner;
    int64_t group;    // channels
    int64_t samples;  // of a channel, in a block
    bool shared;      // one channel's samples among several threads

    Planes(const Shape& shape, const Pool& pool) : outer(shape.outer), channels(shape.channels), inner(shape.inner) {
        group = std::min(channels, std::max<int64_t>(1, stretch / (inner * int64_t(sizeof(T)) + 1)));
        while (group > 1 && !balanced(group, pool.threads)) group = (group + 1) / 2;
        shared = !balanced(group, pool.threads);
        samples = std::max<int64_t>(1, std::min(outer, block / 2 / std::max<int64_t>(1, inner)));
    }

    // Whether the busiest thread has at most a quarter more to do than its share.
    bool balanced(int64_t size, int threads) const {
        const int64_t groups = (channels + size - 1) / size;
        return (groups + threads - 1) / threads * threads * 4 <= groups * 5;
    }
    int64_t groups() const { return (channels + group - 1) / group; }

    // -- one channel's samples as units of work -----------------------------------------------------------------------
    int64_t unit_samples() const { return std::max<int64_t>(1, unit / std::max<int64_t>(1, inner)); }
    int64_t unit_length() const { return std::min(inner, unit); }
    int64_t units_outer() const { return (outer + unit_samples() - 1) / unit_samples(); }
    int64_t units_inner() const { return (inner + unit_length() - 1) / std::max<int64_t>(1, unit_length()); }
    int64_t units() const { return units_outer() * units_inner(); }

    // Calls body(channel, unit, first sample, last sample, first position, last position) for every unit, in parallel.
    template <class Body>
    void for_units(const Pool& pool, Body&& body) const {
        parallel(pool, channels * units(), [&](int64_t begin, int64_t end) {
            for (int64_t u = begin; u < end; ++u) {
                const int64_t c = u / units(), k = u % units();
                const int64_t n = k / units_inner() * unit_samples(), s = k % units_inner() * unit_length();
                body(c, k, n, std::min(outer, n + unit_samples()), s, std::min(inner, s + unit_length()));
            }
        });
    }

    // Calls body(sample, channel, first position, last position) for every run, long ones in parts, in parallel and in the
    // order of memory.
    template <class Body>
    void for_runs(const Pool& pool, Body&& body) const {
        parallel(pool, outer * channels * units_inner(), [&](int64_t begin, int64_t end) {
            for (int64_t u = begin; u < end; ++u) {
                const int64_t run = u / units_inner(), s = u % units_inner() * unit_length();
                body(run / channels, run % channels, s, std::min(inner, s + unit_length()));
            }
            fence();
        });
    }

    // Calls first(channel, n0, n1) for blocks of samples and finish(channel), then second(channel, n), group by group.
    template <class First, class Finish, class Second>
    void for_groups(const Pool& pool, First&& first, Finish&& finish, Second&& second) const {
        parallel(pool, groups(), [&](int64_t begin, int64_t end) {
            for (int64_t k = begin; k < end; ++k) {
                const int64_t c0 = k * group, c1 = std::min(channels, c0 + group);
                for (int64_t n = 0; n < outer; n += samples)
                    for (int64_t c = c0; c < c1; ++c) first(c, n, std::min(outer, n + samples));
                for (int64_t c = c0; c < c1; ++c) finish(c);
                for (int64_t n = outer - 1; n >= 0; --n)
                    for (int64_t c = c0; c < c1; ++c) second(c, n);
            }
            fence();
        });
    }
};

template <class T>
INLINE T* run_of(const View& view, int64_t n, int64_t c, int64_t s = 0) {
    return view.data ? reinterpret_cast<T*>(view.data) + n * view.outer_stride + c * view.channel_stride + s : nullptr;
}

// -- statistics ------------------------------------------------------------------------------------------------------

// For what the working precision cannot add up: infinities, NaN, values whose squares overflow.
template <class T>
NOINLINE void merge_exactly(const T* x, int64_t runs, int64_t stride, int64_t length, Moments& moments) {
    using A = Compute<T>;
    double total = 0, m2 = 0;
    const double n = double(runs) * double(length);
    const auto each = [&](auto&& body) {
        for (int64_t r = 0; r < runs; ++r)
            for_packs<A>(length, [&](int64_t i, auto where) {
                const Pack<A> v = load(x + r * stride + i, where);
                for (int j = 0; j < Pack<A>::size && i + j < length; ++j)
                    body(double(v.part[j / Pack<A>::lanes][j % Pack<A>::lanes]));
            });
    };
    each([&](double v) { total += v; });
    const double mean = total / n;
    each([&](double v) { m2 += (v - mean) * (v - mean); });
    moments.merge(n, mean, m2);
}

template <class T>
INLINE double mean_of(const T* x, int64_t runs, int64_t stride, int64_t length) {
    using A = Compute<T>;
    Pack<A> total[2] = {broadcast(A(0)), broadcast(A(0))};
    for (int64_t r = 0; r < runs; ++r)
        for_packs_by_turns<A>(length, [&](int64_t i, auto where, auto turn) {
            total[turn] = total[turn] + load(x + r * stride + i, where);
        });
    return sum(total[0] + total[1]) / (double(runs) * double(length));
}

// The sums of the deviations from a shift, and of their squares; what lies `ahead` bytes further on is fetched meanwhile.
template <class T>
INLINE void deviations(const T* x, int64_t runs, int64_t stride, int64_t length, int64_t ahead, Compute<T> shift,
                       double& of_d, double& of_dd) {
    using A = Compute<T>;
    const Pack<A> shifts = broadcast(shift), zero = broadcast(A(0));
    Pack<A> d[2] = {zero, zero}, dd[2] = {zero, zero};
    for (int64_t r = 0; r < runs; ++r)
        for_packs_by_turns<A>(length, [&](int64_t i, auto where, auto turn) {
            __builtin_prefetch(reinterpret_cast<const char*>(x + r * stride + i) + ahead);
            const Pack<A> e = only(load(x + r * stride + i, where) - shifts, where);
            d[turn] = d[turn] + e;
            dd[turn] = multiply_add(e, e, dd[turn]);
        });
    of_d = sum(d[0] + d[1]);
    of_dd = sum(dd[0] + dd[1]);
}

// A block's deviations are taken from the mean of the blocks before it, in one reading; where that is far away, or there
// are none yet, from its own mean: it is in the first-level cache then.
template <class T>
NOINLINE void merge_block(const T* x, int64_t runs, int64_t stride, int64_t length, int64_t ahead, Moments& moments) {
    using A = Compute<T>;
    const double n = double(runs) * double(length);
    const bool first_block = moments.count == 0;
    for (bool own : {false, true}) {
        if (!own && first_block) continue;
        const A shift = A(own ? mean_of(x, runs, stride, length) : moments.mean);
        double of_d, of_dd;
        deviations(x, runs, stride, length, ahead, shift, of_d, of_dd);
        if (own ? std::isfinite(of_dd) : is_near(of_d, of_dd, n))
            return moments.merge(n, double(shift) + of_d / n, std::max(0.0, of_dd - of_d * of_d / n));
    }
    merge_exactly(x, runs, stride, length, moments);
}

// Samples n0 to n1 and positions s0 to s1 of a channel.
template <class T>
INLINE void merge_runs(const View& x, int64_t c, int64_t n0, int64_t n1, int64_t s0, int64_t s1, Moments& moments) {
    constexpr int64_t block = Planes<T>::block;
    if (s1 - s0 <= block / 2) {
        const int64_t samples = std::max<int64_t>(1, block / 2 / std::max<int64_t>(Pack<Compute<T>>::size, s1 - s0));
        for (int64_t n = n0; n < n1; n += samples) {
            const int64_t runs = std::min(samples, n1 - n);
            merge_block(run_of<const T>(x, n, c, s0), runs, x.outer_stride, s1 - s0, x.channel_stride * sizeof(T),
                        moments);
        }
        return;
    }
    for (int64_t n = n0; n < n1; ++n)
        for (int64_t s = s0; s < s1; s += block) {
            const int64_t length = std::min(block, s1 - s);
            merge_block(run_of<const T>(x, n, c, s), 1, 0, length, length * int64_t(sizeof(T)), moments);
        }
}

// -- loops over one run ----------------------------------------------------------------------------------------------

template <class T, Kind kind, bool add>
NOINLINE void forward_run(const ForwardRun<T>& run, int64_t length, const Affine& affine,
                          const Coefficients<Compute<T>>& c, bool streaming) {
    using A = Compute<T>;
    const Affines<A> affines = everywhere(c);
    const Pack<A> low = broadcast(A(low_slope(affine.activation)));
    streaming = streaming && aligned(run.y);
    for_packs<A>(length, [&](int64_t i, auto where) {
        forward_pack<T, kind, add>(run, i, where, streaming, affine.activation, affines, low);
    });
}

template <class T, Slope slope>
NOINLINE void reduce_run(const BackwardRun<T>& run, int64_t length, const BackwardMode& mode,
                         const Affines<Compute<T>>& affines, const Pack<Compute<T>>& inverse, Pack<Compute<T>>& total_g,
                         Pack<Compute<T>>& total_gd) {
    using A = Compute<T>;
    Pack<A> sum_g = total_g, sum_gd = total_gd;
    with_recover<slope>(mode.recover, [&](auto recover) {
        for_packs<A>(length, [&](int64_t i, auto where) {
            Pack<A> g, d;
            backward_terms<T, slope>(run, i, where, recover, mode, affines, inverse, g, d);
            sum_g = sum_g + g;  // beyond the end dy is 0, and so is g
            sum_gd = multiply_add(g, d, sum_gd);
        });
    });
    total_g = sum_g;
    total_gd = sum_gd;
}

template <class T, Slope slope>
NOINLINE void backward_run(const BackwardRun<T>& run, int64_t length, BackwardMode mode,
                           const Coefficients<Compute<T>>& c, const InputGradient<Compute<T>>& gradient) {
    using A = Compute<T>;
    const Affines<A> affines = everywhere(c);
    const Pack<A> inverse = broadcast(A(1 / double(c.scale)));
    const InputGradients<A> gradients = everywhere(gradient);
    mode.align(run);
    with_recover<slope>(mode.recover, [&](auto recover) {
        for_packs<A>(length, [&](int64_t i, auto where) {
            backward_pack<T, slope>(run, i, where, recover, mode, affines, inverse, gradients);
        });
    });
}

// -- forward ---------------------------------------------------------------------------------------------------------

template <class T>
INLINE ForwardRun<T> forward_run_of(const View& x, const View& residual, const View& y, uint16_t* bits,
                                    const Shape& shape, int64_t n, int64_t c, int64_t s) {
    const int64_t words = words_per_run(shape);
    uint16_t* of_run = bits ? bits + (n * shape.channels + c) * words + s / Pack<Compute<T>>::size : nullptr;
    return {run_of<const T>(x, n, c, s), run_of<const T>(residual, n, c, s), run_of<T>(y, n, c, s), of_run};
}

template <class T>
void planes_moments(const Shape& shape, const View& x, const Statistics& statistics, double eps, const Running& running,
                    const Pool& pool) {
    using A = Compute<T>;
    const Planes<T> planes(shape, pool);
    std::vector<Moments> found(planes.shared ? shape.channels * planes.units() : shape.channels);
    if (planes.shared) {
        planes.for_units(pool, [&](int64_t c, int64_t k, int64_t n0, int64_t n1, int64_t s0, int64_t s1) {
            merge_runs<T>(x, c, n0, n1, s0, s1, found[c * planes.units() + k]);
        });
    } else {
        planes.for_groups(
            pool, [&](int64_t c, int64_t n0, int64_t n1) { merge_runs<T>(x, c, n0, n1, 0, shape.inner, found[c]); },
            [](int64_t) {}, [](int64_t, int64_t) {});
    }
    const int64_t parts = planes.shared ? planes.units() : 1;
    for (int64_t c = 0; c < shape.channels; ++c) {
        Moments all;
        for (int64_t k = 0; k < parts; ++k) {
            const Moments& part = found[c * parts + k];
            all.merge(part.count, part.mean, part.m2);
        }
        finish_statistics<A>(statistics, running, eps, c, all);
    }
}

template <class T, Kind kind, bool add>
void planes_normalize(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics,
                      const View& residual, const View& y, uint16_t* bits, const Pool& pool) {
    using A = Compute<T>;
    const Planes<T> planes(shape, pool);
    const bool streaming = streams(shape, x, y);
    planes.for_runs(pool, [&](int64_t n, int64_t c, int64_t s0, int64_t s1) {
        forward_run<T, kind, add>(forward_run_of<T>(x, residual, y, bits, shape, n, c, s0), s1 - s0, affine,
                                  coefficients<A>(affine, statistics, c), streaming);
    });
}

template <class T, Kind kind, bool add>
void planes_train_forward(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics,
                          double eps, const Running& running, const View& residual, const View& y, uint16_t* bits,
                          const Pool& pool) {
    using A = Compute<T>;
    const Planes<T> planes(shape, pool);
    if (planes.shared) {
        planes_moments<T>(shape, x, statistics, eps, running, pool);
        return planes_normalize<T, kind, add>(shape, x, affine, statistics, residual, y, bits, pool);
    }
    const bool streaming = streams(shape, x, y);
    std::vector<Moments> found(shape.channels);
    std::vector<Coefficients<A>> coefficient(shape.channels);
    planes.for_groups(
        pool, [&](int64_t c, int64_t n0, int64_t n1) { merge_runs<T>(x, c, n0, n1, 0, shape.inner, found[c]); },
        [&](int64_t c) {
            finish_statistics<A>(statistics, running, eps, c, found[c]);
            coefficient[c] = coefficients<A>(affine, statistics, c);
        },
        [&](int64_t c, int64_t n) {
            forward_run<T, kind, add>(forward_run_of<T>(x, residual, y, bits, shape, n, c, 0), shape.inner, affine,
                                      coefficient[c], streaming);
        });
}

// -- backward --------------------------------------------------------------------------------------------------------

// What the backward loops know of a channel. In place, a channel that cannot be recovered has its input kept elsewhere.
template <class T>
struct BackwardPlanes {
    using A = Compute<T>;
    const Shape& shape;
    const View& dy;
    const Saved& saved;
    const View& dx;
    const View& dresidual;
    BackwardMode mode;

    INLINE bool kept(int64_t c) const { return saved.in_place && saved.slot && saved.slot[c] >= 0; }
    INLINE BackwardMode mode_of(int64_t c) const {
        BackwardMode of_channel = mode;
        of_channel.recover = mode.recover && !kept(c);
        return of_channel;
    }
    INLINE BackwardRun<T> run(int64_t n, int64_t c, int64_t s) const {
        const int64_t words = words_per_run(shape);
        const uint16_t* bits = saved.bits ? saved.bits + (n * shape.channels + c) * words + s / Pack<A>::size : nullptr;
        const T* x = kept(c) ? run_of<const T>(saved.kept, n, saved.slot[c], s) : run_of<const T>(saved.x, n, c, s);
        return {run_of<const T>(dy, n, c, s), x, run_of<const T>(saved.residual, n, c, s), bits, run_of<T>(dx, n, c, s),
                run_of<T>(dresidual, n, c, s)};
    }
};

template <class T, Slope slope>
INLINE void reduce_samples(const BackwardPlanes<T>& planes, int64_t c, int64_t n0, int64_t n1, int64_t s0, int64_t s1,
                           const Coefficients<Compute<T>>& of_channel, double& of_g, double& of_gd) {
    using A = Compute<T>;
    constexpr int64_t block = Planes<T>::block;
    const Affines<A> affines = everywhere(of_channel);
    const Pack<A> inverse = broadcast(A(1 / double(of_channel.scale)));
    const BackwardMode mode = planes.mode_of(c);
    Pack<A> total_g = broadcast(A(0)), total_gd = total_g;
    int64_t added = 0;
    const auto flush = [&] {
        of_g += sum(total_g);
        of_gd += sum(total_gd);
        total_g = total_gd = broadcast(A(0));
        added = 0;
    };
    for (int64_t n = n0; n < n1; ++n)
        for (int64_t s = s0; s < s1; s += block) {
            const int64_t length = std::min(block, s1 - s);
            reduce_run<T, slope>(planes.run(n, c, s), length, mode, affines, inverse, total_g, total_gd);
            // a run shorter than a pack puts one value into each of its lanes all the same
            if ((added += std::max<int64_t>(Pack<A>::size, length)) >= block / 2) flush();
        }
    flush();
}

template <class T, Slope slope>
void planes_backward_reduce(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                            const Statistics& statistics, const Sums& sums, const Pool& pool) {
    using A = Compute<T>;
    const Planes<T> planes(shape, pool);
    const View none{};
    const BackwardMode mode = {affine.activation, saved.in_place, true};
    const BackwardPlanes<T> backward{shape, dy, saved, none, none, mode};
    std::vector<double> of_g(shape.channels * planes.units()), of_gd(of_g.size());
    planes.for_units(pool, [&](int64_t c, int64_t k, int64_t n0, int64_t n1, int64_t s0, int64_t s1) {
        const int64_t at = c * planes.units() + k;
        reduce_samples<T, slope>(backward, c, n0, n1, s0, s1, coefficients<A>(affine, statistics, c), of_g[at],
                                 of_gd[at]);
    });
    for (int64_t c = 0; c < shape.channels; ++c) {
        double g = 0, gd = 0;
        for (int64_t at = c * planes.units(); at < (c + 1) * planes.units(); ++at) g += of_g[at], gd += of_gd[at];
        finish_sums<A>(statistics, sums, c, g, gd);
    }
}

template <class T, Slope slope>
void planes_backward_input(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                           const Statistics& statistics, const Sums& sums, double count, const View& dx,
                           const View& dresidual, const Pool& pool) {
    using A = Compute<T>;
    const Planes<T> planes(shape, pool);
    const BackwardMode mode = gradient_mode(shape, affine, saved, sums.dy != nullptr, dy, dx, dresidual);
    const BackwardPlanes<T> backward{shape, dy, saved, dx, dresidual, mode};
    planes.for_runs(pool, [&](int64_t n, int64_t c, int64_t s0, int64_t s1) {
        backward_run<T, slope>(backward.run(n, c, s0), s1 - s0, backward.mode_of(c),
                               coefficients<A>(affine, statistics, c),
                               input_gradient<A>(affine, statistics, sums, count, c));
    });
}

template <class T, Slope slope>
void planes_train_backward(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                           const Statistics& statistics, const Sums& sums, const View& dx, const View& dresidual,
                           const Pool& pool) {
    using A = Compute<T>;
    const Planes<T> planes(shape, pool);
    const double count = double(shape.outer) * double(shape.inner);
    if (planes.shared) {
        planes_backward_reduce<T, slope>(shape, dy, saved, affine, statistics, sums, pool);
        return planes_backward_input<T, slope>(shape, dy, saved, affine, statistics, sums, count, dx, dresidual, pool);
    }
    const BackwardMode mode = gradient_mode(shape, affine, saved, true, dy, dx, dresidual);
    const BackwardPlanes<T> backward{shape, dy, saved, dx, dresidual, mode};
    std::vector<double> of_g(shape.channels), of_gd(shape.channels);
    std::vector<Coefficients<A>> coefficient(shape.channels);
    std::vector<InputGradient<A>> gradient(shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) coefficient[c] = coefficients<A>(affine, statistics, c);
    planes.for_groups(
        pool,
        [&](int64_t c, int64_t n0, int64_t n1) {
            reduce_samples<T, slope>(backward, c, n0, n1, 0, shape.inner, coefficient[c], of_g[c], of_gd[c]);
        },
        [&](int64_t c) {
            finish_sums<A>(statistics, sums, c, of_g[c], of_gd[c]);
            gradient[c] = input_gradient<A>(affine, statistics, sums, count, c);
        },
        [&](int64_t c, int64_t n) {
            backward_run<T, slope>(backward.run(n, c, 0), shape.inner, backward.mode_of(c), coefficient[c],
                                   gradient[c]);
        });
}
