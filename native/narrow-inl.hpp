// Planes of few positions, 7×7 or 14×14: a channel's run is so short that most of its time would go into beginnings and
// ends. So the runs of a group of channels are taken as one row of a table, as many rows as there are samples, and what
// belongs to a channel is spread out over its columns. A group stays in a thread's cache from its statistics to its output.

template <class T>
struct Narrow {
    using A = Compute<T>;
    static constexpr int64_t cache = 256 * 1024;   // bytes of a group, and
    static constexpr int64_t stretch = 16 * 1024;  // of its row

    int64_t samples, channels, inner;
    int64_t group;  // channels, such that rows begin with whole packs

    Narrow(const Shape& shape, const Pool& pool) : samples(shape.outer), channels(shape.channels), inner(shape.inner) {
        const int64_t unit = narrow_unit(shape), bytes = inner * int64_t(sizeof(T));
        const int64_t wanted = std::min(stretch / bytes, cache / (bytes * samples + 1));
        group = std::max(unit, wanted / unit * unit);
        while (group > unit && groups() < 4 * pool.threads) group = std::max(unit, group / 2 / unit * unit);
    }
    int64_t groups() const { return (channels + group - 1) / group; }

    // Calls body(first channel, how many, columns) for every group, in parallel; the columns are the thread's own.
    template <class Body>
    void for_groups(const Pool& pool, Body&& body) const;
};

// What a thread knows of each column of its group.
template <class A>
struct Spread {
    std::vector<A> shift, scale, offset, inverse, gradient_scale, of_d, constant, sum, sum_of_products;
    std::vector<double> total, total_of_products;  // per column, over blocks of rows

    explicit Spread(int64_t width)
        : shift(width),
          scale(width),
          offset(width),
          inverse(width),
          gradient_scale(width),
          of_d(width),
          constant(width),
          sum(width),
          sum_of_products(width),
          total(width),
          total_of_products(width) {}

    void affine(const Affine& affine, const Statistics& statistics, int64_t c0, int64_t count, int64_t inner) {
        for (int64_t c = 0; c < count; ++c) {
            const Coefficients<A> of_channel = coefficients<A>(affine, statistics, c0 + c);
            std::fill_n(&shift[c * inner], inner, of_channel.shift);
            std::fill_n(&scale[c * inner], inner, of_channel.scale);
            std::fill_n(&offset[c * inner], inner, of_channel.offset);
            std::fill_n(&inverse[c * inner], inner, A(1 / double(of_channel.scale)));
        }
    }
    void gradient(const Affine& affine, const Statistics& statistics, const Sums& sums, double n, int64_t c0,
                  int64_t count, int64_t inner) {
        for (int64_t c = 0; c < count; ++c) {
            const InputGradient<A> of_channel = input_gradient<A>(affine, statistics, sums, n, c0 + c);
            std::fill_n(&gradient_scale[c * inner], inner, of_channel.scale);
            std::fill_n(&of_d[c * inner], inner, of_channel.of_d);
            std::fill_n(&constant[c * inner], inner, of_channel.constant);
        }
    }
    template <class Where>
    INLINE Affines<A> affines(int64_t i, Where where) const {
        return {load(&shift[i], where), load(&scale[i], where), load(&offset[i], where)};
    }
    template <class Where>
    INLINE InputGradients<A> gradients(int64_t i, Where where) const {
        return {load(&gradient_scale[i], where), load(&of_d[i], where), load(&constant[i], where)};
    }
};

template <class T>
template <class Body>
void Narrow<T>::for_groups(const Pool& pool, Body&& body) const {
    parallel(pool, groups(), [&](int64_t begin, int64_t end) {
        Spread<A> spread(group * inner);
        for (int64_t k = begin; k < end; ++k) body(k * group, std::min(group, channels - k * group), spread);
        fence();
    });
}

// The view of a group: its row of each sample.
template <class T>
INLINE View group_of(const View& view, int64_t c0) {
    return view.data ? View{view.data + c0 * view.channel_stride * int64_t(sizeof(T)), view.outer_stride, 1} : view;
}

constexpr int64_t NARROW_BLOCK = 128;  // rows that are added up in the working precision

// Calls body(first row, how many) for all rows, four at a time, the last ones first.
template <class Body>
INLINE void rows_backwards(int64_t rows, Body&& body) {
    int64_t r = rows;
    for (; r >= 4; r -= 4) body(r - 4, std::integral_constant<int, 4>{});
    for (; r > 0; --r) body(r - 1, std::integral_constant<int, 1>{});
}

// -- statistics ------------------------------------------------------------------------------------------------------

// Deviations from the channel's mean, which is known to the working precision already, and their squares, per column.
template <class T>
NOINLINE void add_deviations(const View& x, int64_t rows, int64_t width, Spread<Compute<T>>& spread) {
    using A = Compute<T>;
    std::fill_n(spread.total.begin(), width, 0.0);
    std::fill_n(spread.total_of_products.begin(), width, 0.0);
    for (int64_t begin = 0; begin < rows; begin += NARROW_BLOCK) {
        const int64_t end = std::min(rows, begin + NARROW_BLOCK);
        for_packs<A>(width, [&](int64_t i, auto where) {
            const Pack<A> shift = load(&spread.shift[i], where);
            Pack<A> first, second;
            sum_deviations<T>(x, begin, end, i, where, shift, first, second);
            store(&spread.sum[i], first, where);
            store(&spread.sum_of_products[i], second, where);
        });
        for (int64_t i = 0; i < width; ++i) {
            spread.total[i] += spread.sum[i];
            spread.total_of_products[i] += spread.sum_of_products[i];
        }
    }
}

template <class T>
void narrow_statistics(const View& x, int64_t samples, int64_t inner, int64_t c0, int64_t count, const View& all,
                       const Statistics& statistics, const Running& running, double eps, Spread<Compute<T>>& spread) {
    using A = Compute<T>;
    const int64_t width = count * inner;
    const double n = double(samples) * double(inner);
    std::fill_n(spread.sum.begin(), width, A(0));
    add_columns<T>(x, 0, samples, width, spread.sum.data());
    for (int64_t c = 0; c < count; ++c) {
        double total = 0;
        for (int64_t i = c * inner; i < (c + 1) * inner; ++i) total += spread.sum[i];
        std::fill_n(&spread.shift[c * inner], inner, A(total / n));
    }
    add_deviations<T>(x, samples, width, spread);
    for (int64_t c = 0; c < count; ++c) {
        double of_d = 0, of_dd = 0;
        for (int64_t i = c * inner; i < (c + 1) * inner; ++i)
            of_d += spread.total[i], of_dd += spread.total_of_products[i];
        Moments found;
        if (std::isfinite(of_dd)) {
            const double m2 = of_dd - of_d * of_d / n;
            found.merge(n, double(spread.shift[c * inner]) + of_d / n, m2 > 0 ? m2 : 0);
        } else {
            merge_exactly(run_of<const T>(all, 0, c0 + c), samples, all.outer_stride, inner, found);
        }
        finish_statistics<A>(statistics, running, eps, c0 + c, found);
    }
}

template <class T>
void narrow_moments(const Shape& shape, const View& x, const Statistics& statistics, double eps, const Running& running,
                    const Pool& pool) {
    const Narrow<T> narrow(shape, pool);
    narrow.for_groups(pool, [&](int64_t c0, int64_t count, auto& spread) {
        narrow_statistics<T>(group_of<T>(x, c0), shape.outer, shape.inner, c0, count, x, statistics, running, eps,
                             spread);
    });
}

// -- forward ---------------------------------------------------------------------------------------------------------

template <class T, Kind kind, bool add>
NOINLINE void narrow_rows(const View& x, const View& residual, const View& y, uint16_t* bits, int64_t words,
                          int64_t samples, int64_t width, Activation activation, bool streaming,
                          const Spread<Compute<T>>& spread) {
    using A = Compute<T>;
    const Pack<A> low = broadcast(A(low_slope(activation)));
    rows_backwards(samples, [&](int64_t first, auto rows) {
        ForwardRun<T> run[rows];
        bool around = streaming;
        for (int k = 0; k < rows; ++k) {
            const int64_t n = first + k;
            run[k] = {row_of<const T>(x, n), row_of<const T>(residual, n), row_of<T>(y, n),
                      bits ? bits + n * words : nullptr};
            around = around && aligned(run[k].y);
        }
        for_packs<A>(width, [&](int64_t i, auto where) {
            const Affines<A> affines = spread.affines(i, where);
            for (int k = 0; k < rows; ++k)
                forward_pack<T, kind, add>(run[k], i, where, around, activation, affines, low);
        });
    });
}

template <class T, Kind kind, bool add>
void narrow_forward(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics, double eps,
                    const Running& running, const View& residual, const View& y, uint16_t* bits, const Pool& pool,
                    bool take_statistics) {
    using A = Compute<T>;
    const Narrow<T> narrow(shape, pool);
    const bool streaming = streams(shape, x, y);
    const int64_t inner = shape.inner;
    narrow.for_groups(pool, [&](int64_t c0, int64_t count, Spread<A>& spread) {
        const View xs = group_of<T>(x, c0);
        if (take_statistics)
            narrow_statistics<T>(xs, shape.outer, inner, c0, count, x, statistics, running, eps, spread);
        spread.affine(affine, statistics, c0, count, inner);
        uint16_t* of_group = bits ? bits + c0 * inner / Pack<A>::size : nullptr;
        narrow_rows<T, kind, add>(xs, group_of<T>(residual, c0), group_of<T>(y, c0), of_group, words_per_run(shape),
                                  shape.outer, count * inner, affine.activation, streaming, spread);
    });
}

template <class T, Kind kind, bool add>
void narrow_normalize(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics,
                      const View& residual, const View& y, uint16_t* bits, const Pool& pool) {
    narrow_forward<T, kind, add>(shape, x, affine, statistics, 0, Running{}, residual, y, bits, pool, false);
}

template <class T, Kind kind, bool add>
void narrow_train_forward(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics,
                          double eps, const Running& running, const View& residual, const View& y, uint16_t* bits,
                          const Pool& pool) {
    narrow_forward<T, kind, add>(shape, x, affine, statistics, eps, running, residual, y, bits, pool, true);
}

// -- backward --------------------------------------------------------------------------------------------------------

// A group's tensors, row by row.
template <class T>
struct NarrowBackward {
    View dy;
    Saved saved;
    View dx, dresidual;
    int64_t words;

    NarrowBackward(const Shape& shape, const View& of_dy, const Saved& all, const View& of_dx, const View& of_dresidual,
                   int64_t c0)
        : dy(group_of<T>(of_dy, c0)),
          saved(all),
          dx(group_of<T>(of_dx, c0)),
          dresidual(group_of<T>(of_dresidual, c0)),
          words(words_per_run(shape)) {
        saved.x = group_of<T>(all.x, c0);
        saved.residual = group_of<T>(all.residual, c0);
        if (all.bits) saved.bits = all.bits + c0 * shape.inner / Pack<Compute<T>>::size;
    }
    BackwardRun<T> row(int64_t n) const { return backward_row<T>(dy, saved, words, dx, dresidual, n); }
};

template <class T, Slope slope>
NOINLINE void narrow_sums(const NarrowBackward<T>& backward, int64_t samples, int64_t width, const BackwardMode& mode,
                          Spread<Compute<T>>& spread) {
    using A = Compute<T>;
    std::fill_n(spread.total.begin(), width, 0.0);
    std::fill_n(spread.total_of_products.begin(), width, 0.0);
    for (int64_t begin = 0; begin < samples; begin += NARROW_BLOCK) {
        const int64_t end = std::min(samples, begin + NARROW_BLOCK);
        std::fill_n(spread.sum.begin(), width, A(0));
        std::fill_n(spread.sum_of_products.begin(), width, A(0));
        const auto add_rows = [&](int64_t first, auto rows) {
            BackwardRun<T> run[rows];
            for (int k = 0; k < rows; ++k) run[k] = backward.row(first + k);
            for_packs<A>(width, [&](int64_t i, auto where) {
                const Affines<A> affines = spread.affines(i, where);
                const Pack<A> inverse = mode.recover ? load(&spread.inverse[i], where) : affines.scale;
                Pack<A> sum_g = load(&spread.sum[i], where), sum_gd = load(&spread.sum_of_products[i], where);
                for (int k = 0; k < rows; ++k) {
                    Pack<A> g, d;
                    backward_terms<T, slope>(run[k], i, where, mode, affines, inverse, g, d);
                    sum_g = sum_g + g;
                    sum_gd = multiply_add(g, d, sum_gd);
                }
                store(&spread.sum[i], sum_g, where);
                store(&spread.sum_of_products[i], sum_gd, where);
            });
        };
        int64_t r = begin;
        for (; r + 4 <= end; r += 4) add_rows(r, std::integral_constant<int, 4>{});
        for (; r < end; ++r) add_rows(r, std::integral_constant<int, 1>{});
        for (int64_t i = 0; i < width; ++i) {
            spread.total[i] += spread.sum[i];
            spread.total_of_products[i] += spread.sum_of_products[i];
        }
    }
}

template <class T, Slope slope>
NOINLINE void narrow_gradients(const NarrowBackward<T>& backward, int64_t samples, int64_t width,
                               const BackwardMode& all, const Spread<Compute<T>>& spread) {
    using A = Compute<T>;
    rows_backwards(samples, [&](int64_t first, auto rows) {
        BackwardRun<T> run[rows];
        BackwardMode mode = all;
        for (int k = 0; k < rows; ++k) {
            run[k] = backward.row(first + k);
            mode.streaming = mode.streaming && aligned(run[k].dx);
        }
        for_packs<A>(width, [&](int64_t i, auto where) {
            const Affines<A> affines = spread.affines(i, where);
            const Pack<A> inverse = mode.recover ? load(&spread.inverse[i], where) : affines.scale;
            const InputGradients<A> gradients = spread.gradients(i, where);
            for (int k = 0; k < rows; ++k) backward_pack<T, slope>(run[k], i, where, mode, affines, inverse, gradients);
        });
    });
}

// With or without the sums of this batch, with or without the gradients.
template <class T, Slope slope>
void narrow_backward(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                     const Statistics& statistics, const Sums& sums, double count, const View& dx,
                     const View& dresidual, const Pool& pool, bool take_sums) {
    using A = Compute<T>;
    const Narrow<T> narrow(shape, pool);
    const BackwardMode mode = {affine.activation, saved.in_place, sums.dy != nullptr, streams(shape, dy, dx)};
    const int64_t inner = shape.inner;
    narrow.for_groups(pool, [&](int64_t c0, int64_t channels, Spread<A>& spread) {
        const NarrowBackward<T> backward(shape, dy, saved, dx, dresidual, c0);
        const int64_t width = channels * inner;
        spread.affine(affine, statistics, c0, channels, inner);
        if (take_sums) {
            narrow_sums<T, slope>(backward, shape.outer, width, mode, spread);
            for (int64_t c = 0; c < channels; ++c) {
                double g = 0, gd = 0;
                for (int64_t i = c * inner; i < (c + 1) * inner; ++i)
                    g += spread.total[i], gd += spread.total_of_products[i];
                finish_sums<A>(statistics, sums, c0 + c, g, gd);
            }
        }
        if (!dx.data) return;
        spread.gradient(affine, statistics, sums, count, c0, channels, inner);
        narrow_gradients<T, slope>(backward, shape.outer, width, mode, spread);
    });
}

template <class T, Slope slope>
void narrow_backward_reduce(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                            const Statistics& statistics, const Sums& sums, const Pool& pool) {
    narrow_backward<T, slope>(shape, dy, saved, affine, statistics, sums, 1, View{}, View{}, pool, true);
}

template <class T, Slope slope>
void narrow_backward_input(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                           const Statistics& statistics, const Sums& sums, double count, const View& dx,
                           const View& dresidual, const Pool& pool) {
    narrow_backward<T, slope>(shape, dy, saved, affine, statistics, sums, count, dx, dresidual, pool, false);
}

template <class T, Slope slope>
void narrow_train_backward(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                           const Statistics& statistics, const Sums& sums, const View& dx, const View& dresidual,
                           const Pool& pool) {
    const double count = double(shape.outer) * double(shape.inner);
    narrow_backward<T, slope>(shape, dy, saved, affine, statistics, sums, count, dx, dresidual, pool, true);
}
