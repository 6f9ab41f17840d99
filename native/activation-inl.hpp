// The activations and their slopes on packs. Float uses polynomials whose relative error is about one unit in the last
// place; double uses the C library, lane by lane. At a kink the slope is the one that torch's backward pass takes.

template <class A, class Function>
INLINE Pack<A> each_lane(Pack<A> z, Function function) {
    for (int i = 0; i < Pack<A>::parts; ++i)
        for (int j = 0; j < Pack<A>::lanes; ++j) z.part[i][j] = function(z.part[i][j]);
    return z;
}

// e^x − 1 and, exactly one more, e^x: x = k·ln 2 + r with |r| ≤ ln 2 / 2, e^x − 1 = 2^k·(e^r − 1) + (2^k − 1).
struct Exponential {
    Pack<float> minus_one, value;
};
INLINE Exponential exponential(Pack<float> x) {
    using P = Pack<float>;
    x = select(broadcast(88.0f) < x, broadcast(88.0f), x);  // NaN passes both
    x = select(x < broadcast(-87.0f), broadcast(-87.0f), x);
    Exponential r;
    UNROLLED for (int i = 0; i < P::parts; ++i) {
        const P::Register v = x.part[i];
        const P::Register magic = 12582912.0f - P::Register{};  // 1.5·2^23: adding it rounds to a whole number
        const P::Register shifted = v * 1.44269504f + magic;
        const P::Register k = shifted - magic;
        P::Register rest = v - k * 0.693145752f;  // ln 2 in two parts, the first with few bits: k times it is exact
        rest = rest - k * 1.42860677e-6f;
        P::Register q = rest * (1.0f / 5040) + (1.0f / 720);  // the series of e^r − 1 − r, over r²
        q = q * rest + (1.0f / 120);
        q = q * rest + (1.0f / 24);
        q = q * rest + (1.0f / 6);
        q = q * rest + 0.5f;
        q = q * rest * rest + rest;
        P::Mask bits, magic_bits;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        __builtin_memcpy(&magic_bits, &magic, sizeof bits);
        bits = (bits - magic_bits + 127) << 23;
        P::Register power;
        __builtin_memcpy(&power, &bits, sizeof bits);
        r.minus_one.part[i] = power * q + (power - 1.0f);
        r.value.part[i] = power * q + power;
    }
    return r;
}

INLINE Pack<float> sigmoid(const Pack<float>& z) {
    return broadcast(1.0f) / (broadcast(1.0f) + exponential(broadcast(0.0f) - z).value);
}
INLINE Pack<double> sigmoid(const Pack<double>& z) {
    return each_lane(z, [](double v) { return 1 / (1 + std::exp(-v)); });
}

INLINE Pack<float> tanh(const Pack<float>& z) {
    Pack<float> twice = z + z;
    twice = select(broadcast(40.0f) < twice, broadcast(40.0f), twice);
    twice = select(twice < broadcast(-40.0f), broadcast(-40.0f), twice);
    const Pack<float> e = exponential(twice).minus_one;
    return e / (e + broadcast(2.0f));
}
INLINE Pack<double> tanh(const Pack<double>& z) {
    return each_lane(z, [](double v) { return std::tanh(v); });
}

// Φ(z), the normal distribution function, and φ(z), its density.
template <class A>
struct Normal {
    Pack<A> distribution, density;
};
INLINE Normal<float> normal(const Pack<float>& z) {
    // For x = |z|/√2, Φ(−|z|) = e^(−x²)·R(t)/2 with R = e^(x²)·erfc(x) as a polynomial in t = 1/(1 + 0.4·x): a
    // least-squares fit at Chebyshev nodes for 0 ≤ x ≤ 10.5, relative error 4e-8.
    constexpr float fit[] = {2.146288663e-05f,   2.2518302001e-01f,  2.3048361522e-01f, 1.8165565199e-01f,
                             2.5588435194e-01f,  -4.3921173495e-02f, 2.4513406706e-01f, -3.9972063709e-02f,
                             -8.5125829184e-02f, 3.0656931333e-02f};
    const Pack<float> zero = broadcast(0.0f), one = broadcast(1.0f);
    const Pack<float> x = select(z < zero, zero - z, z) * broadcast(0.707106781f);
    const Pack<float> t = one / multiply_add(x, broadcast(0.4f), one);
    Pack<float> p = broadcast(fit[9]);
    for (int k = 8; k >= 0; --k) p = multiply_add(p, t, broadcast(fit[k]));
    const Pack<float> e = exponential(zero - x * x).value;
    const Pack<float> tail = p * e * broadcast(0.5f);
    return {select(z < zero, tail, one - tail), e * broadcast(0.39894228f)};
}
INLINE Normal<double> normal(const Pack<double>& z) {
    return {each_lane(z, [](double v) { return 0.5 * std::erfc(-v * 0.70710678118654752440); }),
            each_lane(z, [](double v) { return 0.39894228040143267794 * std::exp(-0.5 * v * v); })};
}

// Out of line, so that the polynomials do not crowd the registers of the loops that need none.
template <class A>
NOINLINE void activate_other(Activation activation, Pack<A>& z) {
    const Pack<A> zero = broadcast(A(0)), three = broadcast(A(3)), six = broadcast(A(6));
    switch (activation) {
        case Activation::relu6:
            z = select(z < zero, zero, z);
            z = select(six < z, six, z);
            break;
        case Activation::hardswish: {
            Pack<A> gate = z + three;
            gate = select(gate < zero, zero, gate);
            gate = select(six < gate, six, gate);
            z = z * gate * broadcast(A(1) / A(6));
            break;
        }
        case Activation::silu: z = z * sigmoid(z); break;
        case Activation::sigmoid: z = sigmoid(z); break;
        case Activation::tanh: z = tanh(z); break;
        case Activation::gelu: z = z * normal(z).distribution; break;
        default: break;
    }
}

template <class A>
NOINLINE void slope_other(Activation activation, Pack<A>& z) {
    const Pack<A> zero = broadcast(A(0)), one = broadcast(A(1)), three = broadcast(A(3));
    switch (activation) {
        case Activation::relu:  // of a residual too, of which no bits were kept
            z = select(zero < z, one, zero);
            break;
        case Activation::leaky_relu: z = select(zero < z, one, broadcast(A(activation.slope))); break;
        case Activation::relu6: z = select((zero < z) & (z < broadcast(A(6))), one, zero); break;
        case Activation::hardswish: {
            const Pack<A> middle = multiply_add(z, broadcast(A(1) / A(3)), broadcast(A(0.5)));
            z = select(zero - three < z, select(z < three, middle, one), select(z < zero, zero, middle));
            break;
        }
        case Activation::silu: {
            const Pack<A> s = sigmoid(z);
            z = s * multiply_add(z, one - s, one);
            break;
        }
        case Activation::sigmoid: {
            const Pack<A> s = sigmoid(z);
            z = s * (one - s);
            break;
        }
        case Activation::tanh: {
            const Pack<A> s = tanh(z);
            z = one - s * s;
            break;
        }
        case Activation::gelu: {
            const Normal<A> n = normal(z);
            z = multiply_add(z, n.density, n.distribution);
            break;
        }
        default: z = one; break;
    }
}

// What a loop is compiled for; the rest of the activations is told apart inside.
enum class Kind { none, rectifier, other };

INLINE Kind kind_of(Activation activation) {
    if (activation == Activation::none) return Kind::none;
    const bool rectifier = activation == Activation::relu || activation == Activation::leaky_relu;
    return rectifier ? Kind::rectifier : Kind::other;
}
// The slope below zero of the two rectifiers; in the backward pass with bits, that of every element without its bit.
INLINE double low_slope(Activation activation) { return activation == Activation::leaky_relu ? activation.slope : 0.0; }

template <Kind kind, class A>
INLINE Pack<A> activate(Activation activation, const Pack<A>& low, Pack<A> z) {
    if constexpr (kind == Kind::rectifier) {
        const Pack<A> zero = broadcast(A(0));
        // 0 and not z·0, which is NaN for an infinite z
        return activation == Activation::relu ? select(z < zero, zero, z) : select(zero < z, z, z * low);
    }
    if constexpr (kind == Kind::other) activate_other(activation, z);
    return z;
}

// Where the slope is 1 and not the low one: what the bits say.
template <class A>
INLINE PackMask<A> passes(Activation activation, const Pack<A>& z) {
    const PackMask<A> positive = broadcast(A(0)) < z;
    return activation == Activation::relu6 ? positive & (z < broadcast(A(6))) : positive;
}
