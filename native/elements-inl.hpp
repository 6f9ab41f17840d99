// What happens to one pack of one channel (planes) or of as many channels as it has lanes (rows): the formulas of batch
// normalization and of its backward pass. Planes and rows walk through memory differently and share these.

// z = (x − shift)·scale + offset: the shift is the mean rounded to the working precision, and what the rounding lost is in
// the offset, so that z is exact to a few units however large the mean is beside the standard deviation.
template <class A>
struct Coefficients {
    A shift, scale, offset;
};

template <class A>
INLINE Coefficients<A> coefficients(const Affine& affine, const Statistics& statistics, int64_t c) {
    const double weight = affine.weight ? static_cast<const A*>(affine.weight)[c] : 1.0;
    const double bias = affine.bias ? static_cast<const A*>(affine.bias)[c] : 0.0;
    const double mean = statistics.mean[c], scale = weight * statistics.rstd[c];
    const A shift = A(mean);
    return {shift, A(scale), A(bias - (mean - double(shift)) * scale)};
}

template <class A>
struct Affines {
    Pack<A> shift, scale, offset;
};
template <class A>
INLINE Affines<A> everywhere(const Coefficients<A>& c) {
    return {broadcast(c.shift), broadcast(c.scale), broadcast(c.offset)};
}

// -- forward ---------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardRun {
    const T* x;
    const T* residual;
    T* y;
    uint16_t* bits;
};

template <class T>
INLINE bool aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % BATCHNORM_BYTES == 0;
}

// Streaming stores go around the caches; whole packs only, at aligned addresses (see `streams`).
template <class T, class Where>
INLINE void put(T* p, const Pack<Compute<T>>& a, Where where, bool streaming) {
    if constexpr (sizeof(T) >= 4 && std::is_same_v<Where, Whole>) {
        if (streaming) {
            UNROLLED for (int i = 0; i < Pack<T>::parts; ++i)
                stream(p + i * Pack<T>::lanes, a.part[i]);
            return;
        }
    }
    store(p, a, where);
}

template <class T, Kind kind, bool add, class Where>
INLINE void forward_pack(const ForwardRun<T>& run, int64_t i, Where where, bool streaming, Activation activation,
                         const Affines<Compute<T>>& affine, const Pack<Compute<T>>& low) {
    using A = Compute<T>;
    Pack<A> z = multiply_add(load(run.x + i, where) - affine.shift, affine.scale, affine.offset);
    if constexpr (add) {
        z = z + load(run.residual + i, where);
        if (run.bits) run.bits[i / Pack<A>::size] = word_of(passes(activation, z));
    }
    put(run.y + i, activate<kind>(activation, low, z), where, streaming);
}

// -- backward --------------------------------------------------------------------------------------------------------

// Where activation′ comes from.
enum class Slope {
    one,      // there is no activation
    sign,     // a rectifier without residual: the sign of z, or in place of y
    bits,     // kept by the forward pass
    function  // of z, computed again
};

template <class T>
struct BackwardRun {
    const T* dy;
    const T* x;  // in place: y
    const T* residual;
    const uint16_t* bits;
    T* dx;
    T* dresidual;
};

// What is the same for all values of a call: told apart by branches that always go the same way, for loops of their own
// would only make the library larger.
struct BackwardMode {
    Activation activation;
    bool recover;                     // x holds the output, from which the input is found
    bool centered;                    // mean and rstd depend on x
    bool streaming = false;           // dx goes around the caches,
    bool streaming_residual = false;  // and the residual's gradient

    // Only to addresses that allow it: to be asked for each run.
    template <class T>
    INLINE void align(const BackwardRun<T>& run) {
        streaming = streaming && aligned(run.dx);
        streaming_residual = streaming_residual && aligned(run.dresidual);
    }
};

// Calls body(whether to recover) with a constant: it may be true only where the slope leaves something to recover from.
template <Slope slope, class Body>
INLINE void with_recover(bool recover, Body&& body) {
    if constexpr (slope == Slope::one || slope == Slope::sign)
        if (recover) return body(std::true_type{});
    body(std::false_type{});
}

// g = dy · activation′ and d = x − shift.
template <class T, Slope slope, class Where, class Recover>
INLINE void backward_terms(const BackwardRun<T>& run, int64_t i, Where where, Recover recover, const BackwardMode& mode,
                           const Affines<Compute<T>>& affine, const Pack<Compute<T>>& inverse, Pack<Compute<T>>& g,
                           Pack<Compute<T>>& d) {
    using A = Compute<T>;
    const Pack<A> zero = broadcast(A(0));
    g = load(run.dy + i, where);
    Pack<A> x = load(run.x + i, where);
    PackMask<A> positive;
    if constexpr (recover) {
        positive = zero < x;
        if constexpr (slope == Slope::sign) x = select(positive, x, x * broadcast(A(1 / mode.activation.slope)));
        d = (x - affine.offset) * inverse;
    } else {
        d = x - affine.shift;
        if constexpr (slope == Slope::sign) positive = zero < multiply_add(d, affine.scale, affine.offset);
    }
    if constexpr (slope == Slope::function) {
        Pack<A> z = multiply_add(d, affine.scale, affine.offset);
        if (run.residual) z = z + load(run.residual + i, where);
        slope_other(mode.activation, z);
        g = g * z;
    }
    if constexpr (slope == Slope::bits) positive = mask_of<A>(run.bits[i / Pack<A>::size]);
    if constexpr (slope == Slope::bits || slope == Slope::sign) {
        // 0 and not dy·0, which is NaN for an infinite dy
        const Pack<A> low = mode.activation == Activation::leaky_relu ? g * broadcast(A(mode.activation.slope)) : zero;
        g = select(positive, g, low);
    }
}

// dx = scale·(g + of_d·d + constant), which is weight·rstd·(g − Σg/n − x̂·Σ(g·x̂)/n). The scale stays outside: rstd²
// would be nothing in float for a standard deviation above 10^19.
template <class A>
struct InputGradient {
    A scale, of_d, constant;
};

// sums.dy == nullptr: mean and rstd are constants, dx = weight·rstd·g.
template <class A>
INLINE InputGradient<A> input_gradient(const Affine& affine, const Statistics& statistics, const Sums& sums,
                                       double count, int64_t c) {
    const double weight = affine.weight ? static_cast<const A*>(affine.weight)[c] : 1.0;
    const double mean = statistics.mean[c], rstd = statistics.rstd[c], scale = weight * rstd;
    if (!sums.dy) return {A(scale), 0, 0};
    const double of_x = -rstd * sums.dy_xhat[c] / count;
    const double constant = -sums.dy[c] / count - of_x * (mean - double(A(mean)));
    return {A(scale), A(of_x), A(constant)};
}

template <class A>
struct InputGradients {
    Pack<A> scale, of_d, constant;
};
template <class A>
INLINE InputGradients<A> everywhere(const InputGradient<A>& c) {
    return {broadcast(c.scale), broadcast(c.of_d), broadcast(c.constant)};
}

template <class T, Slope slope, class Where, class Recover>
INLINE void backward_pack(const BackwardRun<T>& run, int64_t i, Where where, Recover recover, const BackwardMode& mode,
                          const Affines<Compute<T>>& affine, const Pack<Compute<T>>& inverse,
                          const InputGradients<Compute<T>>& gradient) {
    using A = Compute<T>;
    Pack<A> g, d;
    backward_terms<T, slope>(run, i, where, recover, mode, affine, inverse, g, d);
    if (run.dresidual) put(run.dresidual + i, g, where, mode.streaming_residual);
    if (mode.centered) g = g + multiply_add(d, gradient.of_d, gradient.constant);
    put(run.dx + i, g * gradient.scale, where, mode.streaming);
}

// Σg·x̂ = rstd·(Σg·d − (mean − shift)·Σg)
template <class A>
INLINE void finish_sums(const Statistics& statistics, const Sums& sums, int64_t c, double of_g, double of_gd) {
    const double mean = statistics.mean[c];
    sums.dy[c] = of_g;
    sums.dy_xhat[c] = statistics.rstd[c] * (of_gd - (mean - double(A(mean))) * of_g);
}

// -- statistics ------------------------------------------------------------------------------------------------------

// Count, mean and M2 of a set of values, merged by the rule of Chan, Golub & LeVeque.
struct Moments {
    double count = 0, mean = 0, m2 = 0;

    INLINE void merge(double n, double other_mean, double other_m2) {
        if (n == 0) return;
        const double total = count + n, delta = other_mean - mean, share = n / total;
        m2 += other_m2 + delta * delta * count * share;
        mean += delta * share;
        count = total;
    }
};

// Whether n deviations from a shift, by their sum and the sum of their squares, tell the variance: at most half of the
// squares is due to the shift's distance from the mean. Not so for what is infinite, or NaN.
INLINE bool is_near(double of_d, double of_dd, double n) {
    return std::isfinite(of_dd) && of_d * of_d <= 0.5 * n * of_dd;
}

// Likewise where a few units of rounding more do no harm: the shift is within four standard deviations of the mean.
INLINE bool tells_variance(double of_d, double of_dd, double n) {
    return std::isfinite(of_dd) && of_d * of_d <= 16.0 / 17.0 * n * of_dd;
}

template <class A>
INLINE void update_running(const Running& running, int64_t c, double count, double mean, double m2) {
    if (!running.mean || !(count > 1)) return;
    A* means = static_cast<A*>(running.mean);
    A* variances = static_cast<A*>(running.variance);
    const A new_mean = A((1 - running.momentum) * double(means[c]) + running.momentum * mean);
    const A new_variance = A((1 - running.momentum) * double(variances[c]) + running.momentum * (m2 / (count - 1)));
    if (std::isfinite(new_mean) && std::isfinite(new_variance)) {
        means[c] = new_mean;
        variances[c] = new_variance;
    } else if (running.refused) {
        running.refused->store(true, std::memory_order_relaxed);
    }
}

template <class A>
INLINE void finish_statistics(const Statistics& statistics, const Running& running, double eps, int64_t c,
                              const Moments& moments) {
    statistics.mean[c] = moments.mean;
    statistics.m2[c] = moments.m2;
    statistics.rstd[c] = 1 / std::sqrt(moments.m2 / (moments.count > 1 ? moments.count : 1) + eps);
    update_running<A>(running, c, moments.count, moments.mean, moments.m2);
}

// -- threads ---------------------------------------------------------------------------------------------------------

template <class Body>
INLINE void parallel(const Pool& pool, int64_t n, Body&& body) {
    if (n <= 0) return;
    if (n == 1 || pool.threads <= 1) return body(int64_t(0), n);
    using Plain = std::remove_reference_t<Body>;
    pool.run(
        n, 1, [](int64_t begin, int64_t end, void* context) { (*static_cast<Plain*>(context))(begin, end); }, &body);
}
