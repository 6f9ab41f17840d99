// A table: rows of values, side by side in memory, whose columns belong to channels. Channels-last tensors are tables with
// one column for each channel; so are the samples of narrow planes, where a channel has a run of columns. What is known of
// a channel is spread out over its columns, and the loops below go through a few rows at a time, which share what they
// load of the columns. How a tensor is shared out among threads is said elsewhere.

template <int n>
using Count = std::integral_constant<int, n>;

template <class T>
INLINE T* row_of(const View& view, int64_t r) {
    return view.data ? reinterpret_cast<T*>(view.data) + r * view.outer_stride : nullptr;
}

// How the rows of a table are gone through: four at a time, which share what is loaded of the columns, or one by one: that
// is one long stretch of memory instead of four, and faster where it does not come from the nearest caches.
enum class Pace { four, one };

// Rows that are added up in the working precision: 32 additions, of four rows each or of one.
INLINE int64_t added_rows(Pace pace) { return pace == Pace::one ? 32 : 128; }

// Calls body(first row, how many) for all rows.
template <class Body>
INLINE void for_rows(int64_t begin, int64_t end, Pace pace, Body&& body) {
    int64_t r = begin;
    if (pace == Pace::four)
        for (; r + 4 <= end; r += 4) body(r, Count<4>{});
    for (; r < end; ++r) body(r, Count<1>{});
}

// -- what is known of the columns ------------------------------------------------------------------------------------

template <class A>
struct Columns {
    std::vector<A> shift, scale, offset, inverse, gradient_scale, of_d, constant;

    explicit Columns(int64_t width) : shift(padded(width)), scale(padded(width)), offset(padded(width)) {}

    static int64_t padded(int64_t width) { return width + Pack<A>::size; }

    // Gives a value to all `run` columns of a channel. What whole packs put beyond them the next channel overwrites.
    static INLINE void spread(std::vector<A>& to, int64_t channel, int64_t run, A value) {
        A* p = &to[channel * run];
        if (run == 1) {
            *p = value;
            return;
        }
        const Pack<A> values = broadcast(value);
        for (int64_t i = 0; i < run; i += Pack<A>::size) store(p + i, values, Whole{});
    }
    // Channels c0 to c0 + count, of `run` columns each; `recover`: what takes the input back from the output, too.
    void affine(const Affine& affine, const Statistics& statistics, int64_t c0, int64_t count, int64_t run,
                bool recover) {
        if (recover) inverse.resize(shift.size());
        for (int64_t c = 0; c < count; ++c) {
            const Coefficients<A> of_channel = coefficients<A>(affine, statistics, c0 + c);
            spread(shift, c, run, of_channel.shift);
            spread(scale, c, run, of_channel.scale);
            spread(offset, c, run, of_channel.offset);
            if (recover) spread(inverse, c, run, A(1 / double(of_channel.scale)));
        }
    }
    void gradient(const Affine& affine, const Statistics& statistics, const Sums& sums, double n, int64_t c0,
                  int64_t count, int64_t run) {
        for (std::vector<A>* v : {&gradient_scale, &of_d, &constant}) v->resize(shift.size());
        for (int64_t c = 0; c < count; ++c) {
            const InputGradient<A> of_channel = input_gradient<A>(affine, statistics, sums, n, c0 + c);
            spread(gradient_scale, c, run, of_channel.scale);
            spread(of_d, c, run, of_channel.of_d);
            spread(constant, c, run, of_channel.constant);
        }
    }
    template <class Where>
    INLINE Affines<A> affines(int64_t i, Where where) const {
        return {load(&shift[i], where), load(&scale[i], where), load(&offset[i], where)};
    }
    template <class Where, class Recover>
    INLINE Pack<A> inverses(int64_t i, Where where, Recover recover) const {
        if constexpr (recover) return load(&inverse[i], where);
        return {};
    }
    template <class Where>
    INLINE InputGradients<A> gradients(int64_t i, Where where) const {
        return {load(&gradient_scale[i], where), load(&of_d[i], where), load(&constant[i], where)};
    }
};

// -- sums over rows --------------------------------------------------------------------------------------------------

// Two sums for each column: of a block of rows in the working precision, and of all blocks in double.
template <class A>
struct ColumnSums {
    std::vector<A> first, second;
    std::vector<double> total_first, total_second;

    explicit ColumnSums(int64_t width) : first(width), second(width), total_first(width), total_second(width) {}

    // Calls add(first row, last row) for the rows that are added up together; it adds to `first` and `second`.
    template <class Add>
    INLINE void over(int64_t begin, int64_t end, int64_t width, Pace pace, Add&& add) {
        std::fill_n(total_first.begin(), width, 0.0);
        std::fill_n(total_second.begin(), width, 0.0);
        for (int64_t r = begin; r < end; r += added_rows(pace)) {
            std::fill_n(first.begin(), width, A(0));
            std::fill_n(second.begin(), width, A(0));
            add(r, std::min(end, r + added_rows(pace)));
            add_widened(&total_first[0], &first[0], width);
            add_widened(&total_second[0], &second[0], width);
        }
    }
    double of_first(int64_t begin, int64_t end) const { return total_of(&total_first[begin], end - begin); }
    double of_second(int64_t begin, int64_t end) const { return total_of(&total_second[begin], end - begin); }
};

// Deviations from a shift near the mean, and their squares.
template <class T>
NOINLINE void add_deviations(const View& x, int64_t begin, int64_t end, int64_t width, Pace pace,
                             const Compute<T>* shift, ColumnSums<Compute<T>>& sums) {
    using A = Compute<T>;
    sums.over(begin, end, width, pace, [&](int64_t block_begin, int64_t block_end) {
        for_rows(block_begin, block_end, pace, [&](int64_t r, auto rows) {
            const T* row[rows];
            for (int k = 0; k < rows; ++k) row[k] = row_of<const T>(x, r + k);
            for_packs<A>(width, [&](int64_t i, auto where) {
                const Pack<A> about = load(shift + i, where);
                Pack<A> d = load(row[0] + i, where) - about, dd = d * d;
                for (int k = 1; k < rows; ++k) {
                    const Pack<A> e = load(row[k] + i, where) - about;
                    d = d + e;
                    dd = multiply_add(e, e, dd);
                }
                store(&sums.first[i], load(&sums.first[i], where) + d, where);
                store(&sums.second[i], load(&sums.second[i], where) + dd, where);
            });
        });
    });
}

// The means of the columns over a sample of the rows, evenly spread: near those of all rows, as a rule. They are taken as
// deviations from the first row, so that the mean of equal values is exact.
template <class T>
NOINLINE void sample_means(const View& x, int64_t begin, int64_t end, int64_t rows, int64_t width, Compute<T>* mean) {
    using A = Compute<T>;
    std::fill_n(mean, width, A(0));
    const T* origin = row_of<const T>(x, begin);
    for (int64_t k = 1; k < rows; ++k) {
        const T* row = row_of<const T>(x, begin + (end - begin) * k / rows);
        for_packs<A>(width, [&](int64_t i, auto where) {
            store(mean + i, load(mean + i, where) + (load(row + i, where) - load(origin + i, where)), where);
        });
    }
    const Pack<A> part = broadcast(A(1 / double(rows)));
    for_packs<A>(width, [&](int64_t i, auto where) {
        store(mean + i, multiply_add(load(mean + i, where), part, load(origin + i, where)), where);
    });
}

// -- forward ---------------------------------------------------------------------------------------------------------

template <class T, Kind kind, bool add>
NOINLINE void forward_rows(const View& x, const View& residual, const View& y, uint16_t* bits, int64_t words,
                           int64_t begin, int64_t end, int64_t width, Pace pace, Activation activation, bool streaming,
                           const Columns<Compute<T>>& columns) {
    using A = Compute<T>;
    const Pack<A> low = broadcast(A(low_slope(activation)));
    for_rows(begin, end, pace, [&](int64_t first, auto rows) {
        ForwardRun<T> run[rows];
        bool around = streaming;
        for (int k = 0; k < rows; ++k) {
            const int64_t r = first + k;
            run[k] = {row_of<const T>(x, r), row_of<const T>(residual, r), row_of<T>(y, r),
                      bits ? bits + r * words : nullptr};
            around = around && aligned(run[k].y);
        }
        for_packs<A>(width, [&](int64_t i, auto where) {
            const Affines<A> affines = columns.affines(i, where);
            for (int k = 0; k < rows; ++k)
                forward_pack<T, kind, add>(run[k], i, where, around, activation, affines, low);
        });
    });
}

// -- backward --------------------------------------------------------------------------------------------------------

// The tensors of the backward pass as tables.
template <class T>
struct BackwardTable {
    View dy;
    Saved saved;
    View dx, dresidual;
    int64_t words;

    INLINE BackwardRun<T> row(int64_t r) const {
        return {row_of<const T>(dy, r),
                row_of<const T>(saved.x, r),
                row_of<const T>(saved.residual, r),
                saved.bits ? saved.bits + r * words : nullptr,
                row_of<T>(dx, r),
                row_of<T>(dresidual, r)};
    }
};

// Σg and Σg·d.
template <class T, Slope slope>
NOINLINE void add_gradients(const BackwardTable<T>& table, int64_t begin, int64_t end, int64_t width, Pace pace,
                            const BackwardMode& mode, const Columns<Compute<T>>& columns,
                            ColumnSums<Compute<T>>& sums) {
    using A = Compute<T>;
    sums.over(begin, end, width, pace, [&](int64_t block_begin, int64_t block_end) {
        for_rows(block_begin, block_end, pace, [&](int64_t r, auto rows) {
            BackwardRun<T> run[rows];
            for (int k = 0; k < rows; ++k) run[k] = table.row(r + k);
            with_recover<slope>(mode.recover, [&](auto recover) {
                for_packs<A>(width, [&](int64_t i, auto where) {
                    const Affines<A> affines = columns.affines(i, where);
                    const Pack<A> inverse = columns.inverses(i, where, recover);
                    Pack<A> sum_g = load(&sums.first[i], where), sum_gd = load(&sums.second[i], where);
                    for (int k = 0; k < rows; ++k) {
                        Pack<A> g, d;
                        backward_terms<T, slope>(run[k], i, where, recover, mode, affines, inverse, g, d);
                        sum_g = sum_g + g;
                        sum_gd = multiply_add(g, d, sum_gd);
                    }
                    store(&sums.first[i], sum_g, where);
                    store(&sums.second[i], sum_gd, where);
                });
            });
        });
    });
}

template <class T, Slope slope>
NOINLINE void backward_rows(const BackwardTable<T>& table, int64_t begin, int64_t end, int64_t width, Pace pace,
                            const BackwardMode& all, const Columns<Compute<T>>& columns) {
    using A = Compute<T>;
    for_rows(begin, end, pace, [&](int64_t first, auto rows) {
        BackwardRun<T> run[rows];
        BackwardMode mode = all;
        for (int k = 0; k < rows; ++k) {
            run[k] = table.row(first + k);
            mode.align(run[k]);
        }
        with_recover<slope>(mode.recover, [&](auto recover) {
            for_packs<A>(width, [&](int64_t i, auto where) {
                const Affines<A> affines = columns.affines(i, where);
                const Pack<A> inverse = columns.inverses(i, where, recover);
                const InputGradients<A> gradients = columns.gradients(i, where);
                for (int k = 0; k < rows; ++k)
                    backward_pack<T, slope>(run[k], i, where, recover, mode, affines, inverse, gradients);
            });
        });
    });
}
