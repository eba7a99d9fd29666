// Causal attention of packed sequences in fp32 on a CPU, forward and backward.
//
// A row is one head's query of one token. Whatever else is in the call, a row's result comes from the same operations
// in the same order: products over the head dimension in eight lanes that are summed at the end, a softmax over all
// keys at once, keys from first to last. The results of an engine that decodes one token and of a trainer that scores
// the whole sequence are therefore bitwise equal. Gradients of keys and values are summed over the rows of their own
// sequence alone.
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
    int64_t count, heads, groups, dim;
};

// The rows of sequence s that share key head ``group``, by token, and their keys. ``share``: query heads per key head;
// ``before``: keys before the first query of the sequence (a cached prefix).
struct Group {
    const Sequences& q;
    int64_t s, group, share, rows, keys, before;

    Group(const Sequences& q, int64_t s, int64_t group)
        : q(q), s(s), group(group), share(q.heads / q.groups),
          rows((q.query_starts[s + 1] - q.query_starts[s]) * share), keys(q.key_starts[s + 1] - q.key_starts[s]),
          before(keys - rows / share) {}

    int64_t seen(int64_t i) const { return before + i / share + 1; }                     // number of keys of row i
    int64_t first(int64_t j) const { return std::max<int64_t>(j - before, 0) * share; }  // first row that sees key j
    int64_t row(int64_t i) const {  // index in [tokens, heads]
        return (q.query_starts[s] + i / share) * q.heads + group * share + i % share;
    }

    template <typename Float>
    Float* row_of(Float* memory, int64_t i) const { return memory + row(i) * q.dim; }
    template <typename Float>
    Float* key_of(Float* memory, int64_t j) const {
        const int64_t at = q.key_starts[s] + j;
        return memory + ((q.slots ? q.slots[at] : at) * q.groups + group) * q.dim;
    }
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
    const float *query, *key, *value;
    float scale;
    float *out, *lse;
    std::vector<float> table;  // of a block's rows and all their keys: scores, then probabilities

    // The softmax is over all keys of a row at once, unlike flash attention's, whose running sum is
    // rescaled at the borders of blocks.
    void operator()(const Group& g) {
        for (int64_t i = 0; i < g.rows; i += ROWS) {
            const int64_t rows = std::min(ROWS, g.rows - i), keys = g.seen(i + rows - 1), length = whole_lanes(keys);
            table.resize(std::max<size_t>(table.size(), rows * length));
            for (int64_t j = 0; j < keys; j += KEYS)
                each_tile(rows, [&](auto size, int64_t r) { score<size()>(g, i + r, j, &table[r * length], length); });
            for (int64_t r = 0; r < rows; ++r) {
                float* p = &table[r * length];
                const float most = peak(p, g.seen(i + r)) * scale, sum = weigh(p, g.seen(i + r), length, scale, most);
                lse[g.row(i + r)] = most + std::log(sum);
                const float share = 1 / sum;
                for (int64_t j = 0; j < length; j += LANES) store(p + j, load(p + j) * all(share));
                std::fill(g.row_of(out, i + r), g.row_of(out, i + r) + g.q.dim, 0.0f);
            }
            for (int64_t j = 0; j < keys; j += KEYS)
                each_tile(rows, [&](auto size, int64_t r) { mean<size()>(g, i + r, j, &table[r * length], length); });
        }
    }

    // Scores of R rows from ``row`` on with the KEYS keys from j on, or those that are left.
    template <int R>
    void score(const Group& g, int64_t row, int64_t j, float* table, int64_t length) {
        const float* queries[R];
        float* p[R];
        for (int r = 0; r < R; ++r) {
            queries[r] = g.row_of(query, row + r);
            p[r] = table + r * length + j;
        }
        const int64_t keys = std::min(g.seen(row + R - 1) - j, KEYS);
        multiply<R>(queries, [&](int64_t k) { return g.key_of(key, j + k); }, keys, g.q.dim, p);
    }

    // Adds to R rows of the result their mean of the values from j on.
    template <int R>
    void mean(const Group& g, int64_t row, int64_t j, const float* table, int64_t length) {
        float* outs[R];
        for (int r = 0; r < R; ++r) outs[r] = g.row_of(out, row + r);
        const auto weight = [&](int r, int64_t k) { return table[r * length + k]; };
        const int64_t end = std::min(g.seen(row + R - 1), j + KEYS);
        combine<R>(outs, [&](int64_t k) { return g.key_of(value, k); }, weight, j, end, g.q.dim);
    }
};

// ROWS rows and KEYS keys: their probabilities, the gradients of their scores, and the offsets of the rows.
struct Block {
    float p[ROWS][KEYS], of_scores[ROWS][KEYS];
    int64_t at[ROWS];
};

struct Backward {
    const float *gradient, *query, *key, *value, *out, *lse;
    float scale;
    float *of_query, *of_key, *of_value;
    Block block;

    // Blocks of keys outside, of rows inside: every query's gradient is summed over keys from first to last, every
    // key's over rows from first to last. Within a block rows are done first, because keys read their score gradients.
    void operator()(const Group& g) {
        for (int64_t i = 0; i < g.rows; ++i) std::fill(g.row_of(of_query, i), g.row_of(of_query, i) + g.q.dim, 0.0f);
        for (int64_t j = 0; j < g.keys; j += KEYS)
            for (int64_t i = g.first(j); i < g.rows; i += ROWS) {
                const int64_t rows = std::min(ROWS, g.rows - i), keys = std::min(KEYS, g.keys - j);
                for (int64_t r = 0; r < rows; ++r) block.at[r] = g.row(i + r) * g.q.dim;
                each_tile(rows, [&](auto size, int64_t r) { of_rows<size()>(g, i, j, r, keys); });
                each_tile(keys, [&](auto size, int64_t k) { of_keys<size()>(g, i, j, k, rows); });
            }
    }

    // Rows i + first .. i + first + R - 1 of the block that begins with row i and key j: probabilities from the saved
    // log of the sum of exponentials, gradients of scores, and what they add to the gradient of queries.
    template <int R>
    void of_rows(const Group& g, int64_t i, int64_t j, int64_t first, int64_t keys) {
        const int64_t dim = g.q.dim, length = whole_lanes(keys);
        const float *queries[R], *gradients[R];
        float *p[R], *of_scores[R], *of_queries[R];
        for (int r = 0; r < R; ++r) {
            queries[r] = g.row_of(query, i + first + r);
            gradients[r] = g.row_of(gradient, i + first + r);
            of_queries[r] = g.row_of(of_query, i + first + r);
            p[r] = block.p[first + r];
            of_scores[r] = block.of_scores[first + r];
        }
        const auto key_at = [&](int64_t k) { return g.key_of(key, j + k); };
        const int64_t most = std::min(g.seen(i + first + R - 1) - j, keys);
        multiply<R>(queries, key_at, most, dim, p);
        multiply<R>(gradients, [&](int64_t k) { return g.key_of(value, j + k); }, most, dim, of_scores);
        for (int r = 0; r < R; ++r) {
            const int64_t seen = std::min(g.seen(i + first + r) - j, keys);
            weigh(p[r], seen, length, scale, lse[g.row(i + first + r)]);
            // d score = p (d p - sum of p d p) scale, and the sum equals gradient . out
            std::fill(of_scores[r] + seen, of_scores[r] + length, 0.0f);
            const __m256 shift = all(dot(gradients[r], g.row_of(out, i + first + r), dim));
            for (int64_t k = 0; k < length; k += LANES)
                store(of_scores[r] + k, (load(of_scores[r] + k) - shift) * load(p[r] + k) * all(scale));
        }
        combine<R>(of_queries, key_at, [&](int r, int64_t k) { return of_scores[r][k]; }, 0, most, dim);
    }

    // Keys j + first .. j + first + R - 1 of the same block: what its rows add to the gradients of keys and values.
    template <int R>
    void of_keys(const Group& g, int64_t i, int64_t j, int64_t first, int64_t rows) {
        float *of_keys[R], *of_values[R];
        for (int r = 0; r < R; ++r) {
            of_keys[r] = g.key_of(of_key, j + first + r);
            of_values[r] = g.key_of(of_value, j + first + r);
        }
        const int64_t from = std::max<int64_t>(g.first(j + first) - i, 0), dim = g.q.dim;
        const auto query_at = [&](int64_t row) { return query + block.at[row]; };
        const auto gradient_at = [&](int64_t row) { return gradient + block.at[row]; };
        const auto of_score = [&](int r, int64_t row) { return block.of_scores[row][first + r]; };
        const auto probability = [&](int r, int64_t row) { return block.p[row][first + r]; };
        combine<R>(of_keys, query_at, of_score, from, rows, dim);
        combine<R>(of_values, gradient_at, probability, from, rows, dim);
    }
};

}  // namespace

extern "C" {

// query and out [tokens, heads, dim]; key and value [slots, groups, dim]; lse [tokens, heads], log of the sum of
// exponentials. Sequence s has the queries query_starts[s] .. query_starts[s + 1] - 1, and keys by key_starts; its last
// query sees all of its keys. slots: the row where each key lies; null: in order. dim is a multiple of 8.
void attention_forward(const float* query, const float* key, const float* value, const int32_t* slots,
                       const int64_t* query_starts, const int64_t* key_starts, int64_t sequences, int64_t heads,
                       int64_t groups, int64_t dim, float scale, float* out, float* lse) {
    each_group({query_starts, key_starts, slots, sequences, heads, groups, dim},
               Forward{query, key, value, scale, out, lse, {}});
}

// Writes of_query; adds to of_key and of_value, which the caller has set to zero. Other arguments as above.
void attention_backward(const float* gradient, const float* query, const float* key, const float* value,
                        const float* out, const float* lse, const int32_t* slots, const int64_t* query_starts,
                        const int64_t* key_starts, int64_t sequences, int64_t heads, int64_t groups, int64_t dim,
                        float scale, float* of_query, float* of_key, float* of_value) {
    each_group({query_starts, key_starts, slots, sequences, heads, groups, dim},
               Backward{gradient, query, key, value, out, lse, scale, of_query, of_key, of_value, {}});
}
}
