// Planes of few positions, 7×7 or 14×14: a channel's run is so short that most of its time would go into beginnings and
// ends. So the runs of a group of channels are taken as one row of a table, as many rows as there are samples. A group
// stays in a thread's cache from its statistics to its output.

template <class T>
struct Narrow {
    using A = Compute<T>;
    static constexpr int64_t cache = 256 * 1024;   // bytes of a group, and
    static constexpr int64_t stretch = 16 * 1024;  // of its row
    static constexpr Pace pace = Pace::four;       // it is in the cache

    int64_t samples, channels, inner;
    int64_t group;  // channels, such that rows begin with whole packs

    Narrow(const Shape& shape, const Pool& pool) : samples(shape.outer), channels(shape.channels), inner(shape.inner) {
        const int64_t unit = narrow_unit(shape), bytes = inner * int64_t(sizeof(T));
        const int64_t wanted = std::min(stretch / bytes, cache / (bytes * samples + 1));
        group = std::max(unit, wanted / unit * unit);
        while (group > unit && groups() < 4 * pool.threads) group = std::max(unit, group / 2 / unit * unit);
    }
    int64_t groups() const { return (channels + group - 1) / group; }
    int64_t width() const { return group * inner; }

    // Calls body(first channel, how many, columns, sums) for every group, in parallel; the latter are the thread's own.
    template <class Body>
    void for_groups(const Pool& pool, Body&& body) const {
        parallel(pool, groups(), [&](int64_t begin, int64_t end) {
            Columns<A> columns(width());
            ColumnSums<A> sums(width());
            for (int64_t k = begin; k < end; ++k) body(k * group, std::min(group, channels - k * group), columns, sums);
            fence();
        });
    }
};

// The view of a group: its row of each sample.
template <class T>
INLINE View group_of(const View& view, int64_t c0) {
    return view.data ? View{view.data + c0 * view.channel_stride * int64_t(sizeof(T)), view.outer_stride, 1} : view;
}

// -- statistics ------------------------------------------------------------------------------------------------------

// The moments of those channels of a group that have none yet, about the means of some of its rows, or of all; returns
// whether all have been found.
template <class T>
bool moments_about(const View& x, int64_t rows, int64_t samples, int64_t inner, Columns<Compute<T>>& columns,
                   ColumnSums<Compute<T>>& sums, std::vector<Moments>& found) {
    using A = Compute<T>;
    const int64_t count = int64_t(found.size()), width = count * inner;
    const double n = double(samples) * double(inner);
    sample_means<T>(x, 0, samples, rows, width, &sums.first[0]);
    for (int64_t c = 0; c < count; ++c)
        Columns<A>::spread(columns.shift, c, inner, A(total_of(&sums.first[c * inner], inner) / double(inner)));
    add_deviations<T>(x, 0, samples, width, Narrow<T>::pace, &columns.shift[0], sums);
    bool all = true;
    for (int64_t c = 0; c < count; ++c) {
        if (found[c].count > 0) continue;
        const double d = sums.of_first(c * inner, (c + 1) * inner), dd = sums.of_second(c * inner, (c + 1) * inner);
        if (is_near(d, dd, n))
            found[c] = {n, double(columns.shift[c * inner]) + d / n, dd - d * d / n};
        else
            all = false;
    }
    return all;
}

template <class T>
void narrow_statistics(const View& x, int64_t samples, int64_t inner, int64_t c0, int64_t count, const View& all,
                       const Statistics& statistics, const Running& running, double eps, Columns<Compute<T>>& columns,
                       ColumnSums<Compute<T>>& sums) {
    std::vector<Moments> found(count);
    const int64_t few = std::max<int64_t>(1, samples / 16);
    if (!moments_about<T>(x, few, samples, inner, columns, sums, found))
        moments_about<T>(x, samples, samples, inner, columns, sums, found);
    for (int64_t c = 0; c < count; ++c) {
        if (found[c].count == 0)
            merge_exactly(run_of<const T>(all, 0, c0 + c), samples, all.outer_stride, inner, found[c]);
        finish_statistics<Compute<T>>(statistics, running, eps, c0 + c, found[c]);
    }
}

template <class T>
void narrow_moments(const Shape& shape, const View& x, const Statistics& statistics, double eps, const Running& running,
                    const Pool& pool) {
    const Narrow<T> narrow(shape, pool);
    narrow.for_groups(pool, [&](int64_t c0, int64_t count, auto& columns, auto& sums) {
        narrow_statistics<T>(group_of<T>(x, c0), shape.outer, shape.inner, c0, count, x, statistics, running, eps,
                             columns, sums);
    });
}

// -- forward ---------------------------------------------------------------------------------------------------------

template <class T, Kind kind, bool add>
void narrow_forward(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics, double eps,
                    const Running& running, const View& residual, const View& y, uint16_t* bits, const Pool& pool,
                    bool take_statistics) {
    using A = Compute<T>;
    const Narrow<T> narrow(shape, pool);
    const bool streaming = streams(shape, x, y);
    const int64_t inner = shape.inner, words = words_per_run(shape);
    narrow.for_groups(pool, [&](int64_t c0, int64_t count, Columns<A>& columns, ColumnSums<A>& sums) {
        const View xs = group_of<T>(x, c0), residuals = group_of<T>(residual, c0), ys = group_of<T>(y, c0);
        if (take_statistics)
            narrow_statistics<T>(xs, shape.outer, inner, c0, count, x, statistics, running, eps, columns, sums);
        columns.affine(affine, statistics, c0, count, inner, false);
        uint16_t* of_group = bits ? bits + c0 * inner / Pack<A>::size : nullptr;
        forward_rows<T, kind, add>(xs, residuals, ys, of_group, words, 0, shape.outer, count * inner, narrow.pace,
                                   affine.activation, streaming, columns);
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
BackwardTable<T> backward_group(const Shape& shape, const View& dy, const Saved& saved, const View& dx,
                                const View& dresidual, int64_t c0) {
    BackwardTable<T> table{group_of<T>(dy, c0), saved, group_of<T>(dx, c0), group_of<T>(dresidual, c0),
                           words_per_run(shape)};
    table.saved.x = group_of<T>(saved.x, c0);
    table.saved.residual = group_of<T>(saved.residual, c0);
    if (saved.bits) table.saved.bits = saved.bits + c0 * shape.inner / Pack<Compute<T>>::size;
    return table;
}

// With or without the sums of this batch, with or without the gradients.
template <class T, Slope slope>
void narrow_backward(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                     const Statistics& statistics, const Sums& sums, double count, const View& dx,
                     const View& dresidual, const Pool& pool, bool take_sums) {
    using A = Compute<T>;
    const Narrow<T> narrow(shape, pool);
    const BackwardMode mode = gradient_mode(shape, affine, saved, sums.dy != nullptr, dy, dx, dresidual);
    const int64_t inner = shape.inner;
    narrow.for_groups(pool, [&](int64_t c0, int64_t channels, Columns<A>& columns, ColumnSums<A>& found) {
        const BackwardTable<T> table = backward_group<T>(shape, dy, saved, dx, dresidual, c0);
        const int64_t width = channels * inner;
        columns.affine(affine, statistics, c0, channels, inner, mode.recover);
        if (take_sums) {
            add_gradients<T, slope>(table, 0, shape.outer, width, narrow.pace, mode, columns, found);
            for (int64_t c = 0; c < channels; ++c)
                finish_sums<A>(statistics, sums, c0 + c, found.of_first(c * inner, (c + 1) * inner),
                               found.of_second(c * inner, (c + 1) * inner));
        }
        if (!dx.data) return;
        columns.gradient(affine, statistics, sums, count, c0, channels, inner);
        backward_rows<T, slope>(table, 0, shape.outer, width, narrow.pace, mode, columns);
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
