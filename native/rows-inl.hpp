// Channels-last rows: every row holds one value of each channel, side by side.
//
// Threads share out the rows. Statistics are taken of short blocks of rows and merged; then all threads go through their
// rows a second time, backwards, because what was read last is still in the cache.

template <class T>
struct Rows {
    static constexpr int64_t bytes = 128 * 1024;  // of a block: it is read twice, the second time from the cache

    int64_t rows, channels;
    int64_t block;  // rows
    int64_t tasks;  // shares of the rows

    Rows(const Shape& shape, const Pool& pool) : rows(shape.outer), channels(shape.channels) {
        block = std::min<int64_t>(128, std::max<int64_t>(16, bytes / (channels * int64_t(sizeof(T)) + 1)));
        tasks = std::max<int64_t>(1, std::min<int64_t>(pool.threads, rows / block));
    }
    int64_t begin_of(int64_t task) const { return rows * task / tasks; }

    // Calls body(task, first row, last row) for every share, in parallel.
    template <class Body>
    void for_shares(const Pool& pool, Body&& body) const {
        parallel(pool, tasks, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) body(task, begin_of(task), begin_of(task + 1));
            fence();
        });
    }
    // Calls body(first row, how many) for all rows of a share, four at a time, which share what is loaded of the
    // channels; block by block, the last block first.
    template <class Body>
    void backwards(int64_t begin, int64_t end, Body&& body) const {
        for (int64_t last = end; last > begin; last -= std::min(block, last - begin)) {
            int64_t r = std::max(begin, last - block);
            for (; r + 4 <= last; r += 4) body(r, std::integral_constant<int, 4>{});
            for (; r < last; ++r) body(r, std::integral_constant<int, 1>{});
        }
    }
};

template <class T>
INLINE T* row_of(const View& view, int64_t r) {
    return view.data ? reinterpret_cast<T*>(view.data) + r * view.outer_stride : nullptr;
}

// One number per channel, and how the loops read them.
template <class A>
struct Columns {
    std::vector<A> shift, scale, offset, inverse;

    Columns(const Shape& shape, const Affine& affine, const Statistics& statistics)
        : shift(shape.channels), scale(shape.channels), offset(shape.channels), inverse(shape.channels) {
        for (int64_t c = 0; c < shape.channels; ++c) {
            const Coefficients<A> of_channel = coefficients<A>(affine, statistics, c);
            shift[c] = of_channel.shift;
            scale[c] = of_channel.scale;
            offset[c] = of_channel.offset;
            inverse[c] = A(1 / double(of_channel.scale));
        }
    }
    template <class Where>
    INLINE Affines<A> at(int64_t c, Where where) const {
        return {load(&shift[c], where), load(&scale[c], where), load(&offset[c], where)};
    }
};

template <class A>
struct GradientColumns {
    std::vector<A> scale, of_d, constant;

    GradientColumns(const Shape& shape, const Affine& affine, const Statistics& statistics, const Sums& sums,
                    double count)
        : scale(shape.channels), of_d(shape.channels), constant(shape.channels) {
        for (int64_t c = 0; c < shape.channels; ++c) {
            const InputGradient<A> of_channel = input_gradient<A>(affine, statistics, sums, count, c);
            scale[c] = of_channel.scale;
            of_d[c] = of_channel.of_d;
            constant[c] = of_channel.constant;
        }
    }
    template <class Where>
    INLINE InputGradients<A> at(int64_t c, Where where) const {
        return {load(&scale[c], where), load(&of_d[c], where), load(&constant[c], where)};
    }
};

// -- statistics ------------------------------------------------------------------------------------------------------

// The moments of all channels over the same number of values.
struct ColumnMoments {
    double count = 0;
    std::vector<double> mean, m2;

    explicit ColumnMoments(int64_t channels) : mean(channels), m2(channels) {}

    INLINE void merge_one(int64_t c, double share, double cross, double other_mean, double other_m2) {
        const double delta = other_mean - mean[c];
        m2[c] += other_m2 + delta * delta * cross;
        mean[c] += delta * share;
    }
    void merge(const ColumnMoments& other) {
        if (other.count == 0) return;
        const double total = count + other.count, share = other.count / total, cross = count * share;
        for (size_t c = 0; c < mean.size(); ++c) merge_one(int64_t(c), share, cross, other.mean[c], other.m2[c]);
        count = total;
    }
};

// For what the working precision cannot add up: infinities, NaN, values whose squares overflow.
template <class T>
NOINLINE Moments exact_column(const View& x, int64_t c, int64_t begin, int64_t end) {
    const auto value = [&](int64_t r) { return double(load(row_of<const T>(x, r) + c, Part{1}).part[0][0]); };
    Moments found;
    double total = 0, m2 = 0;
    for (int64_t r = begin; r < end; ++r) total += value(r);
    const double mean = total / double(end - begin);
    for (int64_t r = begin; r < end; ++r) m2 += (value(r) - mean) * (value(r) - mean);
    found.merge(double(end - begin), mean, m2);
    return found;
}

// Adds the columns of a block, four rows at a time.
template <class T>
INLINE void add_columns(const View& x, int64_t begin, int64_t end, int64_t channels, Compute<T>* total) {
    using A = Compute<T>;
    for (int64_t r = begin; r < end; r += 4) {
        const T* row[4];
        const int rows = int(std::min<int64_t>(4, end - r));
        for (int k = 0; k < 4; ++k) row[k] = row_of<const T>(x, r + std::min(k, rows - 1));
        for_packs<A>(channels, [&](int64_t c, auto where) {
            Pack<A> sum = load(total + c, where);
            if (rows == 4)
                sum = sum + ((load(row[0] + c, where) + load(row[1] + c, where)) +
                             (load(row[2] + c, where) + load(row[3] + c, where)));
            else
                for (int k = 0; k < rows; ++k) sum = sum + load(row[k] + c, where);
            store(total + c, sum, where);
        });
    }
}

// Sums, over rows, of the deviations of a pack of columns from a shift, and of their squares.
template <class T, class Where>
INLINE void sum_deviations(const View& x, int64_t begin, int64_t end, int64_t column, Where where,
                           const Pack<Compute<T>>& shift, Pack<Compute<T>>& first, Pack<Compute<T>>& second) {
    using A = Compute<T>;
    Pack<A> first_odd = broadcast(A(0)), second_odd = first_odd;
    first = second = first_odd;
    int64_t r = begin;
    for (; r + 2 <= end; r += 2) {  // two chains of additions, neither waiting for the other
        const Pack<A> d = load(row_of<const T>(x, r) + column, where) - shift;
        const Pack<A> e = load(row_of<const T>(x, r + 1) + column, where) - shift;
        first = first + d;
        first_odd = first_odd + e;
        second = multiply_add(d, d, second);
        second_odd = multiply_add(e, e, second_odd);
    }
    if (r < end) {
        const Pack<A> d = load(row_of<const T>(x, r) + column, where) - shift;
        first = first + d;
        second = multiply_add(d, d, second);
    }
    first = first + first_odd;
    second = second + second_odd;
}

// A block is read twice: once for its own means, then, from the cache, for the deviations from those.
template <class T>
INLINE void merge_rows(const View& x, int64_t begin, int64_t end, std::vector<Compute<T>>& scratch,
                       ColumnMoments& moments) {
    using A = Compute<T>;
    const int64_t channels = int64_t(moments.mean.size());
    const double n = double(end - begin), total = moments.count + n, share = n / total, cross = moments.count * share;
    std::fill(scratch.begin(), scratch.end(), A(0));
    add_columns<T>(x, begin, end, channels, scratch.data());
    for_packs<A>(channels, [&](int64_t c, auto where) {
        const Pack<A> shift = load(&scratch[c], where) * broadcast(A(1 / n));
        Pack<A> first, second;
        sum_deviations<T>(x, begin, end, c, where, shift, first, second);
        A shifts[Pack<A>::size], of_d[Pack<A>::size], of_dd[Pack<A>::size];
        store(shifts, shift, Whole{});
        store(of_d, first, Whole{});
        store(of_dd, second, Whole{});
        const int lanes = int(std::min<int64_t>(Pack<A>::size, channels - c));
        for (int j = 0; j < lanes; ++j) {
            if (!std::isfinite(of_dd[j])) {
                const Moments exact = exact_column<T>(x, c + j, begin, end);
                moments.merge_one(c + j, share, cross, exact.mean, exact.m2);
                continue;
            }
            const double d = of_d[j], m2 = of_dd[j] - d * d / n;
            moments.merge_one(c + j, share, cross, double(shifts[j]) + d / n, m2 > 0 ? m2 : 0);
        }
    });
    moments.count = total;
}

template <class T>
void rows_moments(const Shape& shape, const View& x, const Statistics& statistics, double eps, const Running& running,
                  const Pool& pool) {
    using A = Compute<T>;
    const Rows<T> rows(shape, pool);
    std::vector<ColumnMoments> found(rows.tasks, ColumnMoments(shape.channels));
    std::vector<std::vector<A>> scratch(rows.tasks, std::vector<A>(shape.channels));
    rows.for_shares(pool, [&](int64_t task, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r += rows.block)
            merge_rows<T>(x, r, std::min(end, r + rows.block), scratch[task], found[task]);
    });
    for (int64_t task = 1; task < rows.tasks; ++task) found[0].merge(found[task]);
    for (int64_t c = 0; c < shape.channels; ++c) {
        Moments all;
        all.merge(found[0].count, found[0].mean[c], found[0].m2[c]);
        finish_statistics<A>(statistics, running, eps, c, all);
    }
}

// -- forward ---------------------------------------------------------------------------------------------------------

template <class T, Kind kind, bool add>
void rows_normalize(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics,
                    const View& residual, const View& y, uint16_t* bits, const Pool& pool) {
    using A = Compute<T>;
    const Rows<T> rows(shape, pool);
    const Columns<A> columns(shape, affine, statistics);
    const Pack<A> low = broadcast(A(low_slope(affine.activation)));
    const int64_t words = words_per_run(shape);
    const bool streaming = streams(shape, x, y);
    rows.for_shares(pool, [&](int64_t, int64_t begin, int64_t end) {
        rows.backwards(begin, end, [&](int64_t first, auto count) {
            ForwardRun<T> run[count];
            bool around = streaming;
            for (int k = 0; k < count; ++k) {
                const int64_t r = first + k;
                run[k] = {row_of<const T>(x, r), row_of<const T>(residual, r), row_of<T>(y, r),
                          bits ? bits + r * words : nullptr};
                around = around && aligned(run[k].y);
            }
            for_packs<A>(shape.channels, [&](int64_t c, auto where) {
                const Affines<A> affines = columns.at(c, where);
                for (int k = 0; k < count; ++k)
                    forward_pack<T, kind, add>(run[k], c, where, around, affine.activation, affines, low);
            });
        });
    });
}

template <class T, Kind kind, bool add>
void rows_train_forward(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics,
                        double eps, const Running& running, const View& residual, const View& y, uint16_t* bits,
                        const Pool& pool) {
    rows_moments<T>(shape, x, statistics, eps, running, pool);
    rows_normalize<T, kind, add>(shape, x, affine, statistics, residual, y, bits, pool);
}

// -- backward --------------------------------------------------------------------------------------------------------

template <class T>
INLINE BackwardRun<T> backward_row(const View& dy, const Saved& saved, int64_t words, const View& dx,
                                   const View& dresidual, int64_t r) {
    return {row_of<const T>(dy, r),
            row_of<const T>(saved.x, r),
            row_of<const T>(saved.residual, r),
            saved.bits ? saved.bits + r * words : nullptr,
            row_of<T>(dx, r),
            row_of<T>(dresidual, r)};
}

template <class T, Slope slope>
void rows_backward_reduce(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                          const Statistics& statistics, const Sums& sums, const Pool& pool) {
    using A = Compute<T>;
    const Rows<T> rows(shape, pool);
    const Columns<A> columns(shape, affine, statistics);
    const int64_t channels = shape.channels, words = words_per_run(shape);
    const BackwardMode mode = {affine.activation, saved.in_place, true, false};
    std::vector<std::vector<double>> of_g(rows.tasks, std::vector<double>(channels)), of_gd = of_g;
    std::vector<std::vector<A>> block_g(rows.tasks, std::vector<A>(channels)), block_gd = block_g;
    rows.for_shares(pool, [&](int64_t task, int64_t begin, int64_t end) {
        std::vector<A>&total_g = block_g[task], &total_gd = block_gd[task];
        for (int64_t first = begin; first < end; first += rows.block) {
            const int64_t last = std::min(end, first + rows.block);
            for (int64_t r = first; r < last; r += 2) {
                const bool two = r + 1 < last;
                const BackwardRun<T> run[2] = {backward_row<T>(dy, saved, words, {}, {}, r),
                                               backward_row<T>(dy, saved, words, {}, {}, r + two)};
                for_packs<A>(channels, [&](int64_t c, auto where) {
                    const Affines<A> affines = columns.at(c, where);
                    const Pack<A> inverse = mode.recover ? load(&columns.inverse[c], where) : affines.scale;
                    Pack<A> sum_g = load(&total_g[c], where), sum_gd = load(&total_gd[c], where);
                    for (int k = 0; k <= int(two); ++k) {
                        Pack<A> g, d;
                        backward_terms<T, slope>(run[k], c, where, mode, affines, inverse, g, d);
                        sum_g = sum_g + g;
                        sum_gd = multiply_add(g, d, sum_gd);
                    }
                    store(&total_g[c], sum_g, where);
                    store(&total_gd[c], sum_gd, where);
                });
            }
            for (int64_t c = 0; c < channels; ++c) {
                of_g[task][c] += total_g[c];
                of_gd[task][c] += total_gd[c];
                total_g[c] = total_gd[c] = 0;
            }
        }
    });
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t task = 1; task < rows.tasks; ++task) {
            of_g[0][c] += of_g[task][c];
            of_gd[0][c] += of_gd[task][c];
        }
        finish_sums<A>(statistics, sums, c, of_g[0][c], of_gd[0][c]);
    }
}

template <class T, Slope slope>
void rows_backward_input(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                         const Statistics& statistics, const Sums& sums, double count, const View& dx,
                         const View& dresidual, const Pool& pool) {
    using A = Compute<T>;
    const Rows<T> rows(shape, pool);
    const Columns<A> columns(shape, affine, statistics);
    const GradientColumns<A> gradients(shape, affine, statistics, sums, count);
    const int64_t words = words_per_run(shape);
    const BackwardMode all = {affine.activation, saved.in_place, sums.dy != nullptr, streams(shape, dy, dx)};
    rows.for_shares(pool, [&](int64_t, int64_t begin, int64_t end) {
        rows.backwards(begin, end, [&](int64_t first, auto count) {
            BackwardRun<T> run[count];
            BackwardMode mode = all;
            for (int k = 0; k < count; ++k) {
                run[k] = backward_row<T>(dy, saved, words, dx, dresidual, first + k);
                mode.streaming = mode.streaming && aligned(run[k].dx);
            }
            for_packs<A>(shape.channels, [&](int64_t c, auto where) {
                const Affines<A> affines = columns.at(c, where);
                const Pack<A> inverse = mode.recover ? load(&columns.inverse[c], where) : affines.scale;
                const InputGradients<A> gradient = gradients.at(c, where);
                for (int k = 0; k < count; ++k)
                    backward_pack<T, slope>(run[k], c, where, mode, affines, inverse, gradient);
            });
        });
    });
}

template <class T, Slope slope>
void rows_train_backward(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                         const Statistics& statistics, const Sums& sums, const View& dx, const View& dresidual,
                         const Pool& pool) {
    rows_backward_reduce<T, slope>(shape, dy, saved, affine, statistics, sums, pool);
    rows_backward_input<T, slope>(shape, dy, saved, affine, statistics, sums, double(shape.outer), dx, dresidual, pool);
}
