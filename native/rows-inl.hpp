// Channels-last rows: every row holds one value of each channel, side by side.
//
// Threads share out the rows. Each sums the deviations of its rows from the mean of a sample of them, and what they found
// is merged; then all threads go through their rows a second time. Not backwards, although what was read last is still in
// the cache: memory is read faster forwards, and that was never slower.

template <class T>
struct Rows {
    static constexpr int64_t fewest = 16;  // rows of a share

    int64_t rows;
    int64_t tasks;  // shares of the rows
    Pace pace;

    // tensors: how many of that size a phase reads and writes
    Rows(const Shape& shape, const Pool& pool, int64_t tensors) : rows(shape.outer) {
        const int64_t bytes = tensors * rows * shape.channels * int64_t(sizeof(T));
        pace = bytes > stream_bytes / 2 ? Pace::one : Pace::four;
        tasks = std::max<int64_t>(1, std::min<int64_t>(pool.threads, rows / fewest));
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
};

// -- statistics ------------------------------------------------------------------------------------------------------

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

// The moments of every channel over one share of the rows. Where the mean of the sample was far from that of all, the
// latter is known after the first reading, and those channels are read once more: only those, so that no channel's result
// depends on its neighbours.
template <class T>
void share_moments(const View& x, int64_t begin, int64_t end, int64_t channels, Pace pace, Moments* found) {
    using A = Compute<T>;
    ColumnSums<A> sums(channels);
    std::vector<A> shift(channels);
    const double n = double(end - begin), part = 1 / n;
    sample_means<T>(x, begin, end, std::min<int64_t>(64, (end - begin + 7) / 8), channels, &shift[0]);
    for (bool again : {false, true}) {
        add_deviations<T>(x, begin, end, channels, pace, &shift[0], sums);
        bool far = false;
        for (int64_t c = 0; c < channels; ++c) {
            if (found[c].count > 0) continue;
            const double d = sums.total_first[c], dd = sums.total_second[c], mean = double(shift[c]) + d * part;
            if (is_near(d, dd, n))
                found[c] = {n, mean, dd - d * d * part};
            else if (again)
                found[c] = exact_column<T>(x, c, begin, end);
            else
                shift[c] = A(mean), far = true;
        }
        if (!far) return;
    }
}

template <class T>
void rows_moments(const Shape& shape, const View& x, const Statistics& statistics, double eps, const Running& running,
                  const Pool& pool) {
    const Rows<T> rows(shape, pool, 1);
    std::vector<Moments> found(rows.tasks * shape.channels);
    rows.for_shares(pool, [&](int64_t task, int64_t begin, int64_t end) {
        share_moments<T>(x, begin, end, shape.channels, rows.pace, &found[task * shape.channels]);
    });
    for (int64_t c = 0; c < shape.channels; ++c) {
        Moments all = found[c];
        for (int64_t task = 1; task < rows.tasks; ++task) {
            const Moments& share = found[task * shape.channels + c];
            all.merge(share.count, share.mean, share.m2);
        }
        finish_statistics<Compute<T>>(statistics, running, eps, c, all);
    }
}

// -- forward ---------------------------------------------------------------------------------------------------------

template <class T, Kind kind, bool add>
void rows_normalize(const Shape& shape, const View& x, const Affine& affine, const Statistics& statistics,
                    const View& residual, const View& y, uint16_t* bits, const Pool& pool) {
    const Rows<T> rows(shape, pool, 2);
    Columns<Compute<T>> columns(shape.channels);
    columns.affine(affine, statistics, 0, shape.channels, 1, false);
    const int64_t words = words_per_run(shape);
    const bool streaming = streams(shape, x, y);
    rows.for_shares(pool, [&](int64_t, int64_t begin, int64_t end) {
        forward_rows<T, kind, add>(x, residual, y, bits, words, begin, end, shape.channels, rows.pace,
                                   affine.activation, streaming, columns);
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

template <class T, Slope slope>
void rows_sums(const Shape& shape, const BackwardTable<T>& table, const BackwardMode& mode,
               const Columns<Compute<T>>& columns, const Statistics& statistics, const Sums& sums, const Pool& pool) {
    using A = Compute<T>;
    const Rows<T> rows(shape, pool, 2);
    std::vector<ColumnSums<A>> found(rows.tasks, ColumnSums<A>(shape.channels));
    rows.for_shares(pool, [&](int64_t task, int64_t begin, int64_t end) {
        add_gradients<T, slope>(table, begin, end, shape.channels, rows.pace, mode, columns, found[task]);
    });
    for (int64_t c = 0; c < shape.channels; ++c) {
        double of_g = 0, of_gd = 0;
        for (const ColumnSums<A>& share : found) of_g += share.total_first[c], of_gd += share.total_second[c];
        finish_sums<A>(statistics, sums, c, of_g, of_gd);
    }
}

template <class T, Slope slope>
void rows_gradients(const Shape& shape, const BackwardTable<T>& table, const BackwardMode& mode,
                    const Columns<Compute<T>>& columns, const Pool& pool) {
    const Rows<T> rows(shape, pool, 3);
    rows.for_shares(pool, [&](int64_t, int64_t begin, int64_t end) {
        backward_rows<T, slope>(table, begin, end, shape.channels, rows.pace, mode, columns);
    });
}

template <class T, Slope slope>
void rows_backward_reduce(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                          const Statistics& statistics, const Sums& sums, const Pool& pool) {
    Columns<Compute<T>> columns(shape.channels);
    columns.affine(affine, statistics, 0, shape.channels, 1, saved.in_place);
    const BackwardTable<T> table{dy, saved, {}, {}, words_per_run(shape)};
    rows_sums<T, slope>(shape, table, {affine.activation, saved.in_place, true}, columns, statistics, sums, pool);
}

template <class T, Slope slope>
void rows_backward_input(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                         const Statistics& statistics, const Sums& sums, double count, const View& dx,
                         const View& dresidual, const Pool& pool) {
    Columns<Compute<T>> columns(shape.channels);
    columns.affine(affine, statistics, 0, shape.channels, 1, saved.in_place);
    columns.gradient(affine, statistics, sums, count, 0, shape.channels, 1);
    const BackwardTable<T> table{dy, saved, dx, dresidual, words_per_run(shape)};
    const BackwardMode mode = gradient_mode(shape, affine, saved, sums.dy != nullptr, dy, dx, dresidual);
    rows_gradients<T, slope>(shape, table, mode, columns, pool);
}

template <class T, Slope slope>
void rows_train_backward(const Shape& shape, const View& dy, const Saved& saved, const Affine& affine,
                         const Statistics& statistics, const Sums& sums, const View& dx, const View& dresidual,
                         const Pool& pool) {
    Columns<Compute<T>> columns(shape.channels);
    columns.affine(affine, statistics, 0, shape.channels, 1, saved.in_place);
    const BackwardTable<T> table{dy, saved, dx, dresidual, words_per_run(shape)};
    const BackwardMode mode = gradient_mode(shape, affine, saved, true, dy, dx, dresidual);
    rows_sums<T, slope>(shape, table, mode, columns, statistics, sums, pool);
    columns.gradient(affine, statistics, sums, double(shape.outer), 0, shape.channels, 1);
    rows_gradients<T, slope>(shape, table, mode, columns, pool);
}
