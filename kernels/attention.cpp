// Causal attention of packed sequences in fp32 on a CPU, forward and backward.
//
// A row is one head's query of one token. Whatever else is in the call, a row's result comes from the same operations
// in the same order: products over the head dimension in eight lanes that are summed at the end, a softmax over all
// keys at once, keys from first to last. The results of an engine that decodes one token and of a trainer that scores
// the whole sequence are therefore bitwise equal. Gradients of keys and values are summed over the rows of their own
// sequence alone. Keys outside a row's window add zeros, or nothing, to sums whose lanes follow the key's number.
//
// The compiler must not contract a multiplication and an addition (-ffp-contract=off): fused operations are written as
// such, so that every build computes the same.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int LANES = 8;  // float32 numbers of an AVX register

struct Sequences {
    const int64_t *query_starts, *key_starts;
    const int32_t* slots;
    // value_stride: from one head's value to the next; dim where values are the first numbers of keys
    int64_t count, heads, groups, dim, value_dim, value_stride, window;
};

// The rows of sequence s that share key head ``group``, by token, and their keys. ``share``: query heads per key head;
// ``before``: keys before the first query of the sequence (a cached prefix); ``window``: most keys that a row sees.
struct Group {
    const Sequences& q;
    int64_t s, group, share, rows, keys, before, window;

    Group(const Sequences& q, int64_t s, int64_t group)
        : q(q), s(s), group(group), share(q.heads / q.groups),
          rows((q.query_starts[s + 1] - q.query_starts[s]) * share), keys(q.key_starts[s + 1] - q.key_starts[s]),
          before(keys - rows / share), window(q.window ? std::min(q.window, keys) : keys) {}

    // Row i sees the keys gone(i) .. seen(i) - 1, and key j is seen by the rows first(j) .. end(j) - 1.
    int64_t seen(int64_t i) const { return before + i / share + 1; }
    int64_t gone(int64_t i) const { return window < keys ? std::max<int64_t>(seen(i) - window, 0) : 0; }
    int64_t first(int64_t j) const { return std::max<int64_t>(j - before, 0) * share; }
    int64_t end(int64_t j) const { return std::min(rows, (j + window - before) * share); }

    int64_t head(int64_t i) const { return group * share + i % share; }
    int64_t row(int64_t i) const { return (q.query_starts[s] + i / share) * q.heads + head(i); }  // in [tokens, heads]
    int64_t key(int64_t j) const {  // in [slots, groups]
        const int64_t at = q.key_starts[s] + j;
        return (q.slots ? q.slots[at] : at) * q.groups + group;
    }

    template <typename Float>
    Float* query_of(Float* memory, int64_t i) const { return memory + row(i) * q.dim; }
    template <typename Float>
    Float* out_of(Float* memory, int64_t i) const { return memory + row(i) * q.value_dim; }
    template <typename Float>
    Float* key_of(Float* memory, int64_t j) const { return memory + key(j) * q.dim; }
    template <typename Float>
    Float* value_of(Float* memory, int64_t j) const { return memory + key(j) * q.value_stride; }
};

template <typename Pass>
void each_group(const Sequences& q, Pass pass) {
    for (int64_t s = 0; s < q.count; ++s)
        for (int64_t group = 0; group < q.groups; ++group) pass(Group(q, s, group));
}

// Calls pass(size, first) for four rows at a time, then two, then one. Several rows share every key that is loaded; the
// operations of a row do not depend on how many there are.
template <typename Pass>
void each_tile(int64_t count, Pass pass) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) pass(std::integral_constant<int, 4>(), i);
    if (i + 2 <= count) pass(std::integral_constant<int, 2>(), i), i += 2;
    if (i < count) pass(std::integral_constant<int, 1>(), i);
}

int64_t whole_lanes(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline __m256 all(float value) { return _mm256_set1_ps(value); }
inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }

// Lane i: the sum of x[i]'s lanes, ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
inline __m256 totals(const __m256 (&x)[LANES]) {
    const auto halves = [](__m256 a, __m256 b) {
        return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
    };
    const auto pairs = [](__m256 a, __m256 b) { return _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xEE); };
    const __m256 low = pairs(halves(x[0], x[4]), halves(x[1], x[5]));
    const __m256 high = pairs(halves(x[2], x[6]), halves(x[3], x[7]));
    return _mm256_shuffle_ps(low, high, 0x88) + _mm256_shuffle_ps(low, high, 0xDD);
}

inline float total(__m256 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

inline float dot(const float* a, const float* b, int64_t dim) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES) sum = _mm256_fmadd_ps(load(a + d), load(b + d), sum);
    return total(sum);
}

// e^x for x <= 0: 2^n times a polynomial in the rest, to an ulp or so (coefficients of Cephes' expf); 0 below -87.
inline __m256 exponential(__m256 x) {
    const __m256 n = _mm256_round_ps(x * all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_fnmadd_ps(n, all(-2.12194440e-4f), _mm256_fnmadd_ps(n, all(0.693359375f), x));
    __m256 p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm256_fmadd_ps(p, f, all(c));
    p = _mm256_fmadd_ps(p, f * f, f) + all(1.0f);
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(p * _mm256_castsi256_ps(power), _mm256_cmp_ps(x, all(-87.0f), _CMP_GE_OQ));
}

// To a rounding or two (coefficients of Cephes' tanhf).
inline __m256 hyperbolic_tangent(__m256 x) {
    const __m256 sign = _mm256_and_ps(x, all(-0.0f)), size = _mm256_xor_ps(x, sign), z = x * x;
    __m256 p = all(-5.70498872745e-3f);
    for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
        p = _mm256_fmadd_ps(p, z, all(c));
    const __m256 small = _mm256_fmadd_ps(p * z, x, x), e = exponential(all(-2.0f) * size);
    const __m256 large = _mm256_or_ps((all(1.0f) - e) / (all(1.0f) + e), sign);
    return _mm256_blendv_ps(large, small, _mm256_cmp_ps(size, all(0.625f), _CMP_LT_OQ));
}

// products[r][j] = vectors[r] . key(j) for all j < count. Up to LANES - 1 numbers behind them are overwritten.
template <int R, typename Key>
void multiply(const float* const (&vectors)[R], Key key, int64_t count, int64_t dim, float* const (&products)[R]) {
    constexpr int KEYS = LANES / R;
    for (int64_t j = 0; j < count; j += KEYS) {
        const float* keys[KEYS];
        for (int k = 0; k < KEYS; ++k) keys[k] = key(std::min(j + k, count - 1));
        __m256 sums[LANES] = {};
        for (int64_t d = 0; d < dim; d += LANES) {
            __m256 v[R];
            for (int r = 0; r < R; ++r) v[r] = load(vectors[r] + d);
            for (int k = 0; k < KEYS; ++k) {
                const __m256 x = load(keys[k] + d);
                for (int r = 0; r < R; ++r) sums[r * KEYS + k] = _mm256_fmadd_ps(v[r], x, sums[r * KEYS + k]);
            }
        }
        float results[LANES];
        store(results, totals(sums));
        for (int r = 0; r < R; ++r) std::memcpy(products[r] + j, results + r * KEYS, KEYS * sizeof(float));
    }
}

// out[r] += weight(r, j) * vector(j) for j from first to count - 1, in this order.
template <int R, int COLUMNS, typename Vector, typename Weight>
inline void combine_columns(float* const (&out)[R], Vector vector, Weight weight, int64_t first, int64_t count,
                            int64_t d) {
    __m256 sums[R][COLUMNS];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = load(out[r] + d + c * LANES);
    for (int64_t j = first; j < count; ++j) {
        const float* x = vector(j) + d;
        for (int r = 0; r < R; ++r) {
            const __m256 w = all(weight(r, j));
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] = _mm256_fmadd_ps(w, load(x + c * LANES), sums[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < COLUMNS; ++c) store(out[r] + d + c * LANES, sums[r][c]);
}

template <int R, typename Vector, typename Weight>
void combine(float* const (&out)[R], Vector vector, Weight weight, int64_t first, int64_t count, int64_t dim) {
    constexpr int COLUMNS = LANES / R;
    int64_t d = 0;
    for (; d + COLUMNS * LANES <= dim; d += COLUMNS * LANES)
        combine_columns<R, COLUMNS>(out, vector, weight, first, count, d);
    for (; d < dim; d += LANES) combine_columns<R, 1>(out, vector, weight, first, count, d);
}

// The largest of ``count`` > 0 numbers. What is behind them, up to whole lanes, becomes minus infinity.
float peak(float* numbers, int64_t count) {
    const int64_t length = whole_lanes(count);
    std::fill(numbers + count, numbers + length, -INFINITY);
    __m256 most = load(numbers);
    for (int64_t j = LANES; j < length; j += LANES) most = _mm256_max_ps(most, load(numbers + j));
    float largest = most[0];
    for (int i = 1; i < LANES; ++i) largest = std::max(largest, most[i]);
    return largest;
}

// From products to softcap * tanh(scale * product / softcap), in whole lanes.
void cap(float* products, int64_t length, float scale, float softcap) {
    for (int64_t j = 0; j < length; j += LANES)
        store(products + j, all(softcap) * hyperbolic_tangent(load(products + j) * all(scale / softcap)));
}

// From ``count`` products to exp(scale * product - shift), and 0 behind them up to ``length``. Returns their sum.
float weigh(float* products, int64_t count, int64_t length, float scale, float shift) {
    std::fill(products + count, products + length, -INFINITY);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < length; j += LANES) {
        const __m256 p = exponential(_mm256_fmsub_ps(load(products + j), all(scale), all(shift)));
        store(products + j, p);
        sum += p;
    }
    return total(sum);
}

// Sizes of the blocks that are computed together, so that they stay in the cache. No result depends on them.
constexpr int64_t ROWS = 16, KEYS = 128;

struct Forward {
    const float *query, *key, *value, *sinks;
    float scale, softcap;
    float *out, *lse;
    std::vector<float> table;  // of a block's rows and all the keys from ``from`` on: scores, then probabilities
    int64_t from, stride;

    // The softmax is over all keys of a row at once, unlike flash attention's, whose running sum is
    // rescaled at the borders of blocks.
    void operator()(const Group& g) {
        for (int64_t i = 0; i < g.rows; i += ROWS) {
            const int64_t rows = std::min(ROWS, g.rows - i), keys = g.seen(i + rows - 1);
            from = g.gone(i) / LANES * LANES;
            const int64_t length = whole_lanes(keys - from);
            stride = length + LANES;  // products of a row may be written behind its keys
            table.resize(std::max<size_t>(table.size(), rows * stride));
            for (int64_t j = from; j < keys; j += KEYS)
                each_tile(rows, [&](auto size, int64_t r) { score<size()>(g, i + r, j, &table[r * stride]); });
            for (int64_t r = 0; r < rows; ++r) {
                lse[g.row(i + r)] = normalize(g, i + r, &table[r * stride], length);
                std::fill_n(g.out_of(out, i + r), g.q.value_dim, 0.0f);
            }
            for (int64_t j = from; j < keys; j += KEYS)
                each_tile(rows, [&](auto size, int64_t r) { mean<size()>(g, i + r, j, &table[r * stride]); });
        }
    }

    // Scores of R rows from ``row`` on with the KEYS keys from j on, or those that they see of these.
    template <int R>
    void score(const Group& g, int64_t row, int64_t j, float* table) {
        const int64_t begin = std::max(j, g.gone(row)), end = std::min(g.seen(row + R - 1), j + KEYS);
        const float* queries[R];
        float* p[R];
        for (int r = 0; r < R; ++r) {
            queries[r] = g.query_of(query, row + r);
            p[r] = table + r * stride + (begin - from);
        }
        multiply<R>(queries, [&](int64_t k) { return g.key_of(key, begin + k); }, end - begin, g.q.dim, p);
    }

    // From the scores of a row to probabilities, and 0 for keys that it does not see, up to ``length``. Returns the
    // log of the sum of exponentials. Inlined by force: a call costs up to a tenth of a decode.
    [[gnu::always_inline]] inline float normalize(const Group& g, int64_t row, float* p, int64_t length) {
        const int64_t count = g.seen(row) - from;
        if (softcap) cap(p, whole_lanes(count), scale, softcap);
        std::fill_n(p, g.gone(row) - from, -INFINITY);
        const float factor = softcap ? 1.0f : scale, sink = sinks ? sinks[g.head(row)] : -INFINITY;
        const float most = std::max(peak(p, count) * factor, sink);
        float sum = weigh(p, count, length, factor, most);
        if (sinks) sum += exponential(all(sink - most))[0];
        const float share = 1 / sum;
        for (int64_t j = 0; j < length; j += LANES) store(p + j, load(p + j) * all(share));
        return most + std::log(sum);
    }

    // Adds to R rows of the result their mean of the values from j on.
    template <int R>
    void mean(const Group& g, int64_t row, int64_t j, const float* table) {
        const int64_t begin = std::max(j, g.gone(row)), end = std::min(g.seen(row + R - 1), j + KEYS);
        float* outs[R];
        const float* p[R];
        for (int r = 0; r < R; ++r) {
            outs[r] = g.out_of(out, row + r);
            p[r] = table + r * stride + (begin - from);
        }
        const auto weight = [&](int r, int64_t k) { return p[r][k]; };
        const auto value_at = [&](int64_t k) { return g.value_of(value, begin + k); };
        combine<R>(outs, value_at, weight, 0, end - begin, g.q.value_dim);
    }
};

// ROWS rows and KEYS keys: their probabilities, the gradients of their scores, and where the rows lie.
struct Block {
    float p[ROWS][KEYS], of_scores[ROWS][KEYS];
    const float *queries[ROWS], *gradients[ROWS];
};

struct Backward {
    const float *gradient, *query, *key, *value, *out, *lse;
    float scale, softcap;
    float *of_query, *of_key, *of_value;
    Block block;

    // Blocks of keys outside, of rows inside: every query's gradient is summed over keys from first to last, every
    // key's over rows from first to last. Within a block rows are done first, because keys read their score gradients.
    void operator()(const Group& g) {
        for (int64_t i = 0; i < g.rows; ++i) std::fill_n(g.query_of(of_query, i), g.q.dim, 0.0f);
        for (int64_t j = 0; j < g.keys; j += KEYS) {
            const int64_t keys = std::min(KEYS, g.keys - j), end = g.end(j + keys - 1);
            for (int64_t i = g.first(j); i < end; i += ROWS) {
                const int64_t rows = std::min(ROWS, end - i);
                for (int64_t r = 0; r < rows; ++r) {
                    block.queries[r] = g.query_of(query, i + r);
                    block.gradients[r] = g.out_of(gradient, i + r);
                }
                each_tile(rows, [&](auto size, int64_t r) { of_rows<size()>(g, i, j, r, keys); });
                each_tile(keys, [&](auto size, int64_t k) { of_keys<size()>(g, i, j, k, rows); });
            }
        }
    }

    // Rows i + first .. i + first + R - 1 of the block that begins with row i and key j: probabilities from the saved
    // log of the sum of exponentials, gradients of scores, and what they add to the gradient of queries.
    template <int R>
    void of_rows(const Group& g, int64_t i, int64_t j, int64_t first, int64_t keys) {
        const int64_t dim = g.q.dim, begin = hidden(g, i + first, j) / LANES * LANES;
        const float *queries[R], *gradients[R];
        float *p[R], *of_scores[R], *of_queries[R];
        for (int r = 0; r < R; ++r) {
            queries[r] = block.queries[first + r];
            gradients[r] = block.gradients[first + r];
            of_queries[r] = g.query_of(of_query, i + first + r);
            p[r] = block.p[first + r] + begin;
            of_scores[r] = block.of_scores[first + r] + begin;
        }
        const auto key_at = [&](int64_t k) { return g.key_of(key, j + begin + k); };
        const int64_t most = std::min(g.seen(i + first + R - 1) - j, keys) - begin;
        multiply<R>(queries, key_at, most, dim, p);
        multiply<R>(gradients, [&](int64_t k) { return g.value_of(value, j + begin + k); }, most, g.q.value_dim,
                    of_scores);
        for (int r = 0; r < R; ++r) differentiate(g, i, j, first + r, keys);
        combine<R>(of_queries, key_at, [&](int r, int64_t k) { return of_scores[r][k]; }, 0, most, dim);
    }

    // Row i + r, from products with keys and values to probabilities and gradients of scores: 0 for keys that it does
    // not see.
    void differentiate(const Group& g, int64_t i, int64_t j, int64_t r, int64_t keys) {
        float *p = block.p[r], *of_scores = block.of_scores[r];
        const int64_t length = whole_lanes(keys), begin = hidden(g, i + r, j), end = std::min(g.seen(i + r) - j, keys);
        // d score = p (d p - sum of p d p) scale, and the sum equals gradient . out
        __m256 shift = all(dot(block.gradients[r], g.out_of(out, i + r), g.q.value_dim));
        if (softcap) {  // times d tanh(x) = 1 - tanh(x)^2
            cap(p, whole_lanes(end), scale, softcap);
            for (int64_t k = 0; k < whole_lanes(end); k += LANES) {
                const __m256 tangent = load(p + k) * all(1 / softcap);
                store(of_scores + k, (load(of_scores + k) - shift) * _mm256_fnmadd_ps(tangent, tangent, all(1.0f)));
            }
            shift = all(0.0f);
        }
        std::fill_n(p, begin, -INFINITY);
        weigh(p, end, length, softcap ? 1.0f : scale, lse[g.row(i + r)]);
        std::fill_n(of_scores, begin, 0.0f);
        std::fill(of_scores + end, of_scores + length, 0.0f);
        for (int64_t k = 0; k < length; k += LANES)
            store(of_scores + k, (load(of_scores + k) - shift) * load(p + k) * all(scale));
    }

    // Number of keys of the block that begins with key j before the window of a row.
    int64_t hidden(const Group& g, int64_t row, int64_t j) { return std::max<int64_t>(g.gone(row) - j, 0); }

    // Keys j + first .. j + first + R - 1 of the same block: what its rows add to the gradients of keys and values.
    template <int R>
    void of_keys(const Group& g, int64_t i, int64_t j, int64_t first, int64_t rows) {
        float *of_keys[R], *of_values[R];
        for (int r = 0; r < R; ++r) {
            of_keys[r] = g.key_of(of_key, j + first + r);
            of_values[r] = g.value_of(of_value, j + first + r);
        }
        const int64_t from = std::max<int64_t>(g.first(j + first) - i, 0);
        const int64_t to = std::min(rows, g.end(j + first + R - 1) - i);
        const auto query_at = [&](int64_t row) { return block.queries[row]; };
        const auto gradient_at = [&](int64_t row) { return block.gradients[row]; };
        const auto of_score = [&](int r, int64_t row) { return block.of_scores[row][first + r]; };
        const auto probability = [&](int r, int64_t row) { return block.p[row][first + r]; };
        combine<R>(of_keys, query_at, of_score, from, to, g.q.dim);
        combine<R>(of_values, gradient_at, probability, from, to, g.q.value_dim);
    }
};

}  // namespace

extern "C" {

// query [tokens, heads, dim] and out [tokens, heads, value_dim]; key [slots, groups, dim] and value [slots, groups,
// value_dim], whose heads are value_stride apart; lse [tokens, heads], log of the sum of exponentials. Sequence s has
// the queries query_starts[s] .. query_starts[s + 1] - 1, and keys by key_starts; its last query sees all of its keys,
// or the last ``window`` if not 0. slots: the row where each key lies; null: in order. softcap: scores become softcap *
// tanh(score / softcap); 0: they stay. sinks [heads]: a score without a value, or null. dim and value_dim are multiples
// of 8.
void packed_attention(const float* query, const float* key, const float* value, const int32_t* slots,
                      const float* sinks, const int64_t* query_starts, const int64_t* key_starts, int64_t sequences,
                      int64_t heads, int64_t groups, int64_t dim, int64_t value_dim, int64_t value_stride,
                      int64_t window, float scale, float softcap, float* out, float* lse) {
    each_group({query_starts, key_starts, slots, sequences, heads, groups, dim, value_dim, value_stride, window},
               Forward{query, key, value, sinks, scale, softcap, out, lse, {}, 0, 0});
}

// Writes of_query; adds to of_key and of_value, which the caller has set to zero. Other arguments as above; the sinks
// are in lse.
void packed_attention_backward(const float* gradient, const float* query, const float* key, const float* value,
                               const float* out, const float* lse, const int64_t* query_starts,
                               const int64_t* key_starts, int64_t sequences, int64_t heads, int64_t groups, int64_t dim,
                               int64_t value_dim, int64_t value_stride, int64_t window, float scale, float softcap,
                               float* of_query, float* of_key, float* of_value) {
    each_group({query_starts, key_starts, nullptr, sequences, heads, groups, dim, value_dim, value_stride, window},
               Backward{gradient, query, key, value, out, lse, scale, softcap, of_query, of_key, of_value, {}});
}
}
