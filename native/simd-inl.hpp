// Packs: sixteen floats or eight doubles in as many registers as the instruction set needs, and how data of each dtype
// get into them and out. Included once per instruction set, inside a namespace of its own; BATCHNORM_BYTES is the width of
// a register.

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// The precision in which data of a dtype are computed.
template <class T>
struct compute {
    using type = float;
};
template <>
struct compute<double> {
    using type = double;
};
template <class T>
using Compute = typename compute<T>::type;

template <class A>
struct IntegerOf {
    using type = int32_t;
};
template <>
struct IntegerOf<double> {
    using type = int64_t;
};

template <class A>
struct Pack {
    static constexpr int size = sizeof(A) == 4 ? 16 : 8;
    static constexpr int lanes = BATCHNORM_BYTES / sizeof(A);
    static constexpr int parts = size / lanes;
    using Integer = typename IntegerOf<A>::type;
    typedef A Register __attribute__((vector_size(BATCHNORM_BYTES)));
    typedef Integer Mask __attribute__((vector_size(BATCHNORM_BYTES)));
    Register part[parts];
};
template <class A>
struct PackMask {
    typename Pack<A>::Mask part[Pack<A>::parts];
};

#define EACH_PART UNROLLED for (int i = 0; i < Pack<A>::parts; ++i)

template <class A>
INLINE Pack<A> broadcast(A value) {
    Pack<A> r;
    EACH_PART r.part[i] = value - typename Pack<A>::Register{};
    return r;
}
template <class A>
INLINE Pack<A> operator+(Pack<A> a, const Pack<A>& b) {
    EACH_PART a.part[i] += b.part[i];
    return a;
}
template <class A>
INLINE Pack<A> operator-(Pack<A> a, const Pack<A>& b) {
    EACH_PART a.part[i] -= b.part[i];
    return a;
}
template <class A>
INLINE Pack<A> operator*(Pack<A> a, const Pack<A>& b) {
    EACH_PART a.part[i] *= b.part[i];
    return a;
}
template <class A>
INLINE Pack<A> operator/(Pack<A> a, const Pack<A>& b) {
    EACH_PART a.part[i] /= b.part[i];
    return a;
}
template <class A>
INLINE Pack<A> multiply_add(const Pack<A>& a, const Pack<A>& b, Pack<A> c) {
    EACH_PART c.part[i] = a.part[i] * b.part[i] + c.part[i];  // contracted to one rounding where the machine has it
    return c;
}
template <class A>
INLINE PackMask<A> operator<(const Pack<A>& a, const Pack<A>& b) {
    PackMask<A> r;
    EACH_PART r.part[i] = a.part[i] < b.part[i];
    return r;
}
template <class A>
INLINE PackMask<A> operator&(PackMask<A> a, const PackMask<A>& b) {
    EACH_PART a.part[i] &= b.part[i];
    return a;
}
template <class A>
INLINE Pack<A> select(const PackMask<A>& mask, const Pack<A>& yes, Pack<A> no) {
    EACH_PART no.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
    return no;
}
// Four chains of additions at once: one after the other, sixteen lanes would wait for each other.
template <class A>
INLINE double sum(const Pack<A>& a) {
    typedef A Quarter __attribute__((vector_size(4 * sizeof(A))));
    typedef double Wide __attribute__((vector_size(4 * sizeof(double))));
    Wide total{};
    UNROLLED for (int i = 0; i < Pack<A>::size; i += 4) {
        Quarter quarter;
        __builtin_memcpy(&quarter, reinterpret_cast<const A*>(&a) + i, sizeof quarter);
        total += __builtin_convertvector(quarter, Wide);
    }
    return (total[0] + total[2]) + (total[1] + total[3]);
}

// Bit i of the word is lane i of the pack.
template <class A>
INLINE PackMask<A> mask_of(uint16_t word) {
    using P = Pack<A>;
    PackMask<A> r;
    EACH_PART {
        typename P::Mask weights;
        for (int j = 0; j < P::lanes; ++j) weights[j] = typename P::Integer(1) << (i * P::lanes + j);
        r.part[i] = ((word - typename P::Mask{}) & weights) != 0;
    }
    return r;
}
template <class A>
INLINE uint16_t word_of(const PackMask<A>& mask) {
    unsigned word = 0;
    EACH_PART word |= unsigned(movemask(mask.part[i])) << (i * Pack<A>::lanes);
    return uint16_t(word);
}

// How many elements of a pack lie in memory: all, or the first n.
struct Whole {};
struct Part {
    int n;
};

// -- float and double ------------------------------------------------------------------------------------------------

template <class A, std::enable_if_t<sizeof(A) >= 4, int> = 0>
INLINE Pack<A> load(const A* p, Whole) {
    Pack<A> r;
    EACH_PART __builtin_memcpy(&r.part[i], p + i * Pack<A>::lanes, BATCHNORM_BYTES);
    return r;
}
template <class A, std::enable_if_t<sizeof(A) >= 4, int> = 0>
INLINE void store(A* p, const Pack<A>& a, Whole) {
    EACH_PART __builtin_memcpy(p + i * Pack<A>::lanes, &a.part[i], BATCHNORM_BYTES);
}
template <class A, std::enable_if_t<sizeof(A) >= 4, int> = 0>
INLINE Pack<A> load(const A* p, Part part) {
    Pack<A> r;
    EACH_PART r.part[i] = load_first(p + i * Pack<A>::lanes, part.n - i * Pack<A>::lanes);
    return r;
}
template <class A, std::enable_if_t<sizeof(A) >= 4, int> = 0>
INLINE void store(A* p, const Pack<A>& a, Part part) {
    EACH_PART store_first(p + i * Pack<A>::lanes, a.part[i], part.n - i * Pack<A>::lanes);
}

// -- half precision --------------------------------------------------------------------------------------------------

INLINE Pack<float> load(const bfloat16* p, Whole) {
    using A = float;
    typedef uint16_t Half __attribute__((vector_size(BATCHNORM_BYTES / 2)));
    typedef uint32_t Word __attribute__((vector_size(BATCHNORM_BYTES)));
    Pack<float> r;
    EACH_PART {
        Half half;
        __builtin_memcpy(&half, p + i * Pack<A>::lanes, sizeof half);
        const Word word = __builtin_convertvector(half, Word) << 16;
        __builtin_memcpy(&r.part[i], &word, sizeof word);
    }
    return r;
}
INLINE void store(bfloat16* p, const Pack<float>& a, Whole) {
    using A = float;
    typedef uint16_t Half __attribute__((vector_size(BATCHNORM_BYTES / 2)));
    typedef uint32_t Word __attribute__((vector_size(BATCHNORM_BYTES)));
    EACH_PART {
        Word word;
        __builtin_memcpy(&word, &a.part[i], sizeof word);
        const auto nan = a.part[i] != a.part[i];
        // to the nearest, ties to even
        const Word rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
        const Word result = nan ? Word{} + 0x7fc0 : rounded;
        const Half half = __builtin_convertvector(result, Half);
        __builtin_memcpy(p + i * Pack<A>::lanes, &half, sizeof half);
    }
}
INLINE Pack<float> load(const float16* p, Whole) {
    using A = float;
    Pack<float> r;
    EACH_PART r.part[i] = from_float16(reinterpret_cast<const uint16_t*>(p) + i * Pack<A>::lanes);
    return r;
}
INLINE void store(float16* p, const Pack<float>& a, Whole) {
    using A = float;
    EACH_PART to_float16(reinterpret_cast<uint16_t*>(p) + i * Pack<A>::lanes, a.part[i]);
}
template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
NOINLINE Pack<float> load(const T* p, Part part) {
    T buffer[16] = {};
    for (int j = 0; j < part.n; ++j) buffer[j] = p[j];
    return load(buffer, Whole{});
}
template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
NOINLINE void store(T* p, const Pack<float>& a, Part part) {
    T buffer[16];
    store(buffer, a, Whole{});
    for (int j = 0; j < part.n; ++j) p[j] = buffer[j];
}

// Lanes at and beyond n become zero.
template <class A>
INLINE Pack<A> only(const Pack<A>& a, Whole) {
    return a;
}
template <class A>
INLINE Pack<A> only(const Pack<A>& a, Part part) {
    return select(mask_of<A>(uint16_t((1u << part.n) - 1)), a, broadcast(A(0)));
}

// Calls body(offset, Whole or Part) for each pack of a run of n elements.
template <class A, class Body>
INLINE void for_packs(int64_t n, Body&& body) {
    int64_t i = 0;
    for (; i + Pack<A>::size <= n; i += Pack<A>::size) body(i, Whole{});
    if (i < n) body(i, Part{int(n - i)});
}
// Likewise, and tells body by turns 0 and 1, for two chains of additions that do not wait for each other.
template <class A, class Body>
INLINE void for_packs_by_turns(int64_t n, Body&& body) {
    constexpr std::integral_constant<int, 0> even;
    constexpr std::integral_constant<int, 1> odd;
    int64_t i = 0;
    for (; i + 2 * Pack<A>::size <= n; i += 2 * Pack<A>::size) {
        body(i, Whole{}, even);
        body(i + Pack<A>::size, Whole{}, odd);
    }
    if (i + Pack<A>::size <= n) {
        body(i, Whole{}, even);
        i += Pack<A>::size;
    }
    if (i < n) body(i, Part{int(n - i)}, odd);
}

// -- sums in double --------------------------------------------------------------------------------------------------

// total[i] += p[i]
INLINE void add_widened(double* total, const double* p, int64_t n) {
    using A = double;
    for_packs<A>(n,
                 [&](int64_t i, auto where) { store(total + i, load(total + i, where) + load(p + i, where), where); });
}
INLINE void add_widened(double* total, const float* p, int64_t n) {
    typedef float Half __attribute__((vector_size(BATCHNORM_BYTES / 2)));
    typedef double Wide __attribute__((vector_size(BATCHNORM_BYTES)));
    constexpr int lanes = BATCHNORM_BYTES / 8;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        Half half;
        Wide wide;
        __builtin_memcpy(&half, p + i, sizeof half);
        __builtin_memcpy(&wide, total + i, sizeof wide);
        wide += __builtin_convertvector(half, Wide);
        __builtin_memcpy(total + i, &wide, sizeof wide);
    }
    for (; i < n; ++i) total[i] += p[i];
}
template <class A>
INLINE double total_of(const A* p, int64_t n) {
    Pack<A> total[2] = {broadcast(A(0)), broadcast(A(0))};
    for_packs_by_turns<A>(n, [&](int64_t i, auto where, auto turn) { total[turn] = total[turn] + load(p + i, where); });
    return sum(total[0] + total[1]);
}
#undef EACH_PART
