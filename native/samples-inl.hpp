// Moments of each sample by itself, in each channel, over rows at equal distances: what a watch reads of a batch.
//
// Few values out of much memory, and every run is short: what is read next is fetched early, and one reading does wherever
// the first value of a run is no outlier in it.

template <class T>
struct Samples {
    static constexpr int64_t block = 1024;  // values whose moments are taken in the working precision
    static constexpr int64_t grain = 64;    // channels of a sample that a thread takes at least
    static constexpr int64_t ahead = 2048;  // bytes that are fetched early, at least
};

// Deviations are taken from the first value; where that is far from the others, again from the mean that this gave.
template <class T>
INLINE Moments moments_of_block(const T* x, int64_t runs, int64_t stride, int64_t length, int64_t ahead, double n,
                                double inverse) {
    using A = Compute<T>;
    A shift = load(x, Part{1}).part[0][0];
    for (bool again : {false, true}) {
        double of_d, of_dd;
        deviations(x, runs, stride, length, again ? 0 : ahead, shift, of_d, of_dd);
        const double off = of_d * inverse, mean = double(shift) + off;
        if (again ? std::isfinite(of_dd) : tells_variance(of_d, of_dd, n))
            return {n, mean, std::max(0.0, of_dd - of_d * off)};
        shift = A(mean);
    }
    Moments exact;
    merge_exactly(x, runs, stride, length, exact);
    return exact;
}

template <class T>
void samples_moments(const SampleRows& x, double* mean, double* variance, const Pool& pool) {
    const T* data = reinterpret_cast<const T*>(x.data);
    const int64_t length = std::min(x.width, Samples<T>::block), stride = x.step * x.row_stride;
    const int64_t runs = std::max<int64_t>(1, Samples<T>::block / length);
    const int64_t ahead = std::max(x.channel_stride * int64_t(sizeof(T)), Samples<T>::ahead);
    const int64_t parts = (x.channels + Samples<T>::grain - 1) / Samples<T>::grain;
    parallel(pool, x.samples * parts, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            const int64_t n = part / parts, offset = (x.first + n) % x.step;
            const int64_t rows = (x.rows - offset + x.step - 1) / x.step;
            const int64_t c0 = part % parts * Samples<T>::grain, c1 = std::min(x.channels, c0 + Samples<T>::grain);
            const bool one_block = rows <= runs && x.width == length;
            const double count = double(rows) * double(x.width), inverse = 1 / count;
            for (int64_t c = c0; c < c1; ++c) {
                const T* first = data + n * x.sample_stride + c * x.channel_stride + offset * x.row_stride;
                Moments moments;
                if (one_block) {
                    moments = moments_of_block(first, rows, stride, length, ahead, count, inverse);
                } else {
                    for (int64_t r = 0; r < rows; r += runs)
                        for (int64_t s = 0; s < x.width; s += length) {
                            const int64_t some = std::min(runs, rows - r), width = std::min(length, x.width - s);
                            const double size = double(some) * double(width);
                            const Moments block =
                                moments_of_block(first + r * stride + s, some, stride, width, ahead, size, 1 / size);
                            moments.merge(block.count, block.mean, block.m2);
                        }
                }
                mean[n * x.channels + c] = moments.mean;
                variance[n * x.channels + c] = moments.m2 * inverse;
            }
        }
    });
}
