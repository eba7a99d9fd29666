// Causal attention of packed sequences in fp32 on a CPU, forward and backward.
//
// A row is one head's query of one token. Whatever else is in the call, a row's numbers come from the same operations in
// the same order: products over the head dimension in eight lanes that are added up at the end, a softmax over all keys
// at once, keys from first to last. An engine that decodes one token and a trainer that reads the whole sequence therefore
// get the same bits. Gradients of keys and values are summed over the rows of their own sequence, from first to last.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t LANES = 8;

struct Sequences {
    const int64_t *query_starts, *key_starts;
    const int32_t* slots;
    int64_t count, heads, groups, dim;

    int64_t queries(int64_t s) const { return query_starts[s + 1] - query_starts[s]; }
    int64_t keys(int64_t s) const { return key_starts[s + 1] - key_starts[s]; }
    int64_t rows(int64_t s) const { return queries(s) * (heads / groups); }  // that share a key head
};

// One sequence's keys, values or their gradients of one key head.
template <typename Float>
struct Cache {
    Float* memory;
    const int32_t* slots;
    int64_t first, stride;

    Cache(Float* memory, const Sequences& q, int64_t s, int64_t group)
        : memory(memory + group * q.dim), slots(q.slots), first(q.key_starts[s]), stride(q.groups * q.dim) {}
    Float* operator[](int64_t j) const { return memory + (slots ? slots[first + j] : first + j) * stride; }
};

// R neighbouring rows of a sequence that share a key head: they pass over the keys together.
template <int R>
struct Tile {
    int64_t row[R];   // token * heads + head
    int64_t keys[R];  // that it sees; ascending

    Tile(const Sequences& q, int64_t s, int64_t group, int64_t start) {
        const int64_t share = q.heads / q.groups, before = q.keys(s) - q.queries(s);
        for (int r = 0; r < R; ++r) {
            const int64_t query = (start + r) / share;
            row[r] = (q.query_starts[s] + query) * q.heads + group * share + (start + r) % share;
            keys[r] = before + query + 1;
        }
    }
    int64_t longest() const { return keys[R - 1]; }
};

// For each row of a tile a number for each key: whole lanes, zero or minus infinity beyond the keys that it sees.
struct Table {
    std::vector<float> memory;
    int64_t length = 0;

    void fit(int rows, int64_t keys) {
        length = (keys + LANES - 1) / LANES * LANES;
        memory.resize(std::max<size_t>(memory.size(), rows * length));
    }
    float* operator[](int r) { return memory.data() + r * length; }
};

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }

inline float total(__m256 x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

inline float dot(const float* a, const float* b, int64_t dim) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES) sum = _mm256_fmadd_ps(load(a + d), load(b + d), sum);
    return total(sum);
}

// e^x for x <= 0: 2^n times a polynomial in the rest, to an ulp or so (coefficients of Cephes' expf); 0 below -87.
inline __m256 exponential(__m256 x) {
    const auto all = [](float value) { return _mm256_set1_ps(value); };
    const __m256 n = _mm256_round_ps(x * all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_fnmadd_ps(n, all(-2.12194440e-4f), _mm256_fnmadd_ps(n, all(0.693359375f), x));
    __m256 p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm256_fmadd_ps(p, f, all(c));
    p = _mm256_fmadd_ps(p, f * f, f) + all(1.0f);
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(p * _mm256_castsi256_ps(power), _mm256_cmp_ps(x, all(-87.0f), _CMP_GE_OQ));
}

// products[r][j] = row r of vectors . key j
template <int R, typename Keys>
void multiply(const Tile<R>& tile, const float* vectors, int64_t dim, Keys keys, Table& products) {
    for (int64_t j = 0; j < tile.longest(); ++j) {
        const float* key = keys[j];
        __m256 sums[R] = {};
        for (int64_t d = 0; d < dim; d += LANES) {
            const __m256 k = load(key + d);
            for (int r = 0; r < R; ++r) sums[r] = _mm256_fmadd_ps(load(vectors + tile.row[r] * dim + d), k, sums[r]);
        }
        for (int r = 0; r < R; ++r) products[r][j] = total(sums[r]);
    }
}

// row r of out = sum over j of weights[r][j] * key j
template <int R, typename Keys>
void combine(const Tile<R>& tile, Table& weights, int64_t dim, Keys keys, float* out) {
    for (int64_t d = 0; d < dim; d += LANES) {
        __m256 sums[R] = {};
        for (int64_t j = 0; j < tile.longest(); ++j) {
            const __m256 key = load(keys[j] + d);
            for (int r = 0; r < R; ++r) sums[r] = _mm256_fmadd_ps(_mm256_set1_ps(weights[r][j]), key, sums[r]);
        }
        for (int r = 0; r < R; ++r) store(out + tile.row[r] * dim + d, sums[r]);
    }
}

// key j of keys += weights[r][j] * row r of vectors, one row after the other
template <int R, typename Keys>
void spread(const Tile<R>& tile, Table& weights, int64_t dim, const float* vectors, Keys keys) {
    for (int64_t j = 0; j < tile.longest(); ++j)
        for (int64_t d = 0; d < dim; d += LANES) {
            __m256 sum = load(keys[j] + d);
            for (int r = 0; r < R; ++r)
                if (j < tile.keys[r])
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(weights[r][j]), load(vectors + tile.row[r] * dim + d), sum);
            store(keys[j] + d, sum);
        }
}

// From products to exp(scale * product - shift), 0 beyond ``keys``. Returns their sum.
float weigh(float* products, int64_t keys, int64_t length, float scale, float shift) {
    std::fill(products + keys, products + length, -INFINITY);
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < length; j += LANES) {
        const __m256 p = exponential(_mm256_fmsub_ps(load(products + j), _mm256_set1_ps(scale), _mm256_set1_ps(shift)));
        store(products + j, p);
        sum += p;
    }
    return total(sum);
}

struct Forward {
    const float *query, *key, *value;
    float scale;
    float *out, *lse;
    Table p;

    template <int R>
    void operator()(const Sequences& q, int64_t s, int64_t group, const Tile<R>& tile) {
        p.fit(R, tile.longest());
        multiply(tile, query, q.dim, Cache(key, q, s, group), p);
        for (int r = 0; r < R; ++r) {
            const float peak = *std::max_element(p[r], p[r] + tile.keys[r]) * scale;
            const float sum = weigh(p[r], tile.keys[r], p.length, scale, peak);
            for (int64_t j = 0; j < p.length; j += LANES) store(p[r] + j, load(p[r] + j) / _mm256_set1_ps(sum));
            lse[tile.row[r]] = peak + std::log(sum);
        }
        combine(tile, p, q.dim, Cache(value, q, s, group), out);
    }
};

struct Backward {
    const float *gradient, *query, *key, *value, *out, *lse;
    float scale;
    float *of_query, *of_key, *of_value;
    Table p, of_scores;

    template <int R>
    void operator()(const Sequences& q, int64_t s, int64_t group, const Tile<R>& tile) {
        p.fit(R, tile.longest());
        of_scores.fit(R, tile.longest());
        multiply(tile, query, q.dim, Cache(key, q, s, group), p);
        multiply(tile, gradient, q.dim, Cache(value, q, s, group), of_scores);
        for (int r = 0; r < R; ++r) {
            const int64_t at = tile.row[r] * q.dim;
            weigh(p[r], tile.keys[r], p.length, scale, lse[tile.row[r]]);
            std::fill(of_scores[r] + tile.keys[r], of_scores[r] + p.length, 0.0f);
            const __m256 shift = _mm256_set1_ps(dot(gradient + at, out + at, q.dim));
            for (int64_t j = 0; j < p.length; j += LANES)
                store(of_scores[r] + j, (load(of_scores[r] + j) - shift) * load(p[r] + j) * _mm256_set1_ps(scale));
        }
        combine(tile, of_scores, q.dim, Cache(key, q, s, group), of_query);
        spread(tile, of_scores, q.dim, query, Cache(of_key, q, s, group));
        spread(tile, p, q.dim, gradient, Cache(of_value, q, s, group));
    }
};

template <typename Pass>
void each_tile(const Sequences& q, Pass pass) {
    for (int64_t s = 0; s < q.count; ++s)
        for (int64_t group = 0; group < q.groups; ++group) {
            const int64_t rows = q.rows(s);
            int64_t start = 0;
            for (; start + 4 <= rows; start += 4) pass(q, s, group, Tile<4>(q, s, group, start));
            for (; start + 2 <= rows; start += 2) pass(q, s, group, Tile<2>(q, s, group, start));
            for (; start < rows; ++start) pass(q, s, group, Tile<1>(q, s, group, start));
        }
}

}  // namespace

extern "C" {

// query and out [tokens, heads, dim]; key and value [slots, groups, dim]; lse [tokens, heads], log of the sum of exponentials.
// Sequence s has the queries query_starts[s] .. query_starts[s + 1] - 1, and keys alike; its last query sees all of its keys.
// slots: where each key lies; null: in order. dim is a multiple of 8.
void attention_forward(const float* query, const float* key, const float* value, const int32_t* slots,
                       const int64_t* query_starts, const int64_t* key_starts, int64_t sequences, int64_t heads,
                       int64_t groups, int64_t dim, float scale, float* out, float* lse) {
    each_tile({query_starts, key_starts, slots, sequences, heads, groups, dim}, Forward{query, key, value, scale, out, lse, {}});
}

// of_key and of_value, which begin as zeros, are added to.
void attention_backward(const float* gradient, const float* query, const float* key, const float* value, const float* out,
                        const float* lse, const int32_t* slots, const int64_t* query_starts, const int64_t* key_starts,
                        int64_t sequences, int64_t heads, int64_t groups, int64_t dim, float scale, float* of_query,
                        float* of_key, float* of_value) {
    each_tile({query_starts, key_starts, slots, sequences, heads, groups, dim},
              Backward{gradient, query, key, value, out, lse, scale, of_query, of_key, of_value, {}, {}});
}
}
