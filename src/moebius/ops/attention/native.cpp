// Attention in tiles of 64 queries x 64 keys (FlashAttention-2: Dao 2023), scores never in memory.
//
// Scores stand transposed, S^T[keys, queries]: what belongs to a query (maximum, sum, delta) then runs
// across 16 lanes, weights go packed into the next product as they are made, and nothing inside the
// loops is ever transposed. Exponentials are of base 2: `slope` is scale * log2(e), and the normaliser
// kept for the backward is max * slope + log2(sum). A sink is a key without value, seen first.
//
// Letters: B batch, T queries, S keys, H query heads, G key heads, K and V widths of keys and values,
// KP and VP the same padded with zeros to multiples of 32.
#include <cmath>

#include "kernels.h"

using namespace moebius;

namespace {

constexpr int64_t TILE = 64, AREA = TILE * TILE;
constexpr float LOG2_E = 1.44269504f;
enum Class : uint8_t { NONE, SOME, ALL };

// Steps between the elements of [batch, row, head, width]; the width is contiguous.
struct Strides {
  int64_t batch, row, head;
};

// Laid out as the integers that `native.py` hands over.
struct Call {
  int64_t B, T, S, H, G, K, V;
  Strides q, k, v, dout;
  int64_t mask_batch, mask_row;

  int64_t KP() const { return round_up(K, 32); }
  int64_t VP() const { return round_up(V, 32); }
  int64_t group() const { return H / G; }
  int64_t query_tiles() const { return (T + TILE - 1) / TILE; }
  int64_t key_tiles() const { return (S + TILE - 1) / TILE; }
};

// 2^x, relative error 3e-6 and exact for integers; 0 for -inf.
inline __m512 exp2_16(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0.01342679f);
  for (const float c : {0.0522423f, 0.24128029f, 0.69304483f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, x);
}

// Rows [first, first + 64) of a head as a tile of width `padded`; what is outside reads as 0.
void load_tile(const bf16* x, int64_t step, int64_t first, int64_t rows, int64_t width,
               int64_t padded, bf16* tile) {
  for (int64_t i = 0; i < TILE; ++i) {
    const int64_t inside = first + i < rows ? width : 0;
    if (inside) std::memcpy(tile + i * padded, x + (first + i) * step, inside * sizeof(bf16));
    std::memset(tile + i * padded + inside, 0, (padded - inside) * sizeof(bf16));
  }
}

// The rows of a tile that are inside go out.
void store_tile(const bf16* tile, int64_t padded, int64_t width, bf16* x, int64_t step,
                int64_t first, int64_t rows) {
  for (int64_t i = 0; i < std::min(TILE, rows - first); ++i)
    std::memcpy(x + (first + i) * step, tile + i * padded, width * sizeof(bf16));
}

// Which keys of a tile a query sees, as bits.
inline uint64_t seen_by(const Call& c, const uint8_t* mask, int64_t b, int64_t t, int64_t key) {
  const int64_t inside = std::min(TILE, c.S - key);
  const __mmask64 lanes = inside == TILE ? ~0ull : (1ull << inside) - 1;
  const uint8_t* row = mask + b * c.mask_batch + t * c.mask_row + key;
  return _mm512_test_epi8_mask(_mm512_maskz_loadu_epi8(lanes, row), _mm512_set1_epi8(-1));
}

Class classify(const Call& c, const uint8_t* mask, int64_t b, int64_t query, int64_t key) {
  const int64_t rows = std::min(TILE, c.T - query);
  uint64_t any = 0, every = ~0ull;
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t bits = seen_by(c, mask, b, query + i, key);
    any |= bits;
    every &= bits;
  }
  if (!any) return NONE;
  return rows == TILE && every == ~0ull ? ALL : SOME;
}

// Which queries of a tile see each of its keys: bit t of seen[s].
void visible(const Call& c, const uint8_t* mask, int64_t b, int64_t query, int64_t key,
             uint64_t* seen) {
  for (int64_t i = 0; i < TILE; ++i)
    seen[i] = query + i < c.T ? seen_by(c, mask, b, query + i, key) : 0;
  // The transpose of 64 x 64 bits: halves, quarters, ... change places.
  uint64_t low = 0x00000000ffffffffull;
  for (int64_t step = 32; step; step >>= 1, low ^= low << step)
    for (int64_t base = 0; base < TILE; base += 2 * step)
      for (int64_t i = base; i < base + step; ++i) {
        const uint64_t swap = ((seen[i] >> step) ^ seen[i + step]) & low;
        seen[i] ^= swap << step;
        seen[i + step] ^= swap;
      }
}

inline __mmask16 lanes16(const uint64_t* seen, int64_t s, int64_t n) {
  return static_cast<__mmask16>(seen[s] >> n);
}

// Rows a and b as bf16 pairs (a0, b0, a1, b1, ...), from (a0, a1, ..., b0, b1, ...).
inline __m512i pair_up(__m512bh rows) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i bits;
  std::memcpy(&bits, &rows, 64);
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), bits);
}

inline void store_rows(bf16* first, bf16* second, __m512bh rows) {
  std::memcpy(first, &rows, 32);
  std::memcpy(second, reinterpret_cast<const char*>(&rows) + 32, 32);
}

// A tile of scores becomes one of packed weights. The maximum (of scores) and the sum (of weights) of
// each query move on; `shrink` is what earlier sums are to be multiplied with. Whether any is below 1.
template <bool WHOLE>
bool soften(const float* score, const uint64_t* seen, float slope, float* high, float* sum,
            float* shrink, bf16* weight) {
  const __m512 slope16 = _mm512_set1_ps(slope);
  __mmask16 rose = 0;
  __m512 top[4];
  for (int n = 0; n < 4; ++n) top[n] = load16(high + 16 * n);
  for (int64_t s = 0; s < TILE; ++s)
    for (int n = 0; n < 4; ++n) {
      const __m512 x = load16(score + s * TILE + 16 * n);
      top[n] = WHOLE ? _mm512_max_ps(top[n], x)
                     : _mm512_mask_max_ps(top[n], lanes16(seen, s, 16 * n), top[n], x);
    }
  for (int64_t n = 0; n < TILE; n += 16) {
    const __m512 before = load16(high + n), now = top[n / 16];
    const __m512 less = exp2_16(_mm512_mul_ps(_mm512_sub_ps(before, now), slope16));
    rose |= _mm512_cmp_ps_mask(before, now, _CMP_LT_OQ);
    store16(high + n, now);
    store16(shrink + n, less);
    const __m512 offset = _mm512_mul_ps(now, slope16);
    __m512 total = _mm512_mul_ps(load16(sum + n), less);
    for (int64_t s = 0; s < TILE; s += 2) {
      const float* from = score + s * TILE + n;
      __m512 a = exp2_16(_mm512_fmsub_ps(load16(from), slope16, offset));
      __m512 b = exp2_16(_mm512_fmsub_ps(load16(from + TILE), slope16, offset));
      if (!WHOLE) {
        a = _mm512_maskz_mov_ps(lanes16(seen, s, n), a);
        b = _mm512_maskz_mov_ps(lanes16(seen, s + 1, n), b);
      }
      total = _mm512_add_ps(total, _mm512_add_ps(a, b));
      _mm512_storeu_si512(weight + s * TILE + 2 * n, pair_up(_mm512_cvtne2ps_pbh(b, a)));
    }
    store16(sum + n, total);
  }
  return rose != 0;
}

struct ForwardScratch {
  explicit ForwardScratch(const Call& c)
      : key(c.key_tiles() * TILE * c.KP()),
        value(c.key_tiles() * TILE * c.VP()),
        query(TILE * c.KP()),
        rows(TILE * std::max(c.KP(), c.VP())),
        score(AREA),
        weight(AREA),
        out(c.VP() * TILE) {}
  Buffer<bf16> key, value, query, rows;  // value: tiles of [VP, keys]
  Buffer<float> score;
  Buffer<bf16> weight;
  Buffer<float> out;  // [VP, queries]
};

struct Forward {
  const Call& c;
  const bf16 *q, *k, *v;
  const uint8_t* mask;
  const float* sink;
  float scale;
  const uint8_t* classes;
  bf16* out;
  float* lse;

  // Keys as rows and values transposed, of all tiles that queries of tiles [from, to) see.
  void prepare(int64_t b, int64_t g, int64_t from, int64_t to, ForwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP();
    for (int64_t j = 0; j < c.key_tiles(); ++j) {
      bool wanted = false;
      for (int64_t i = from; i < to; ++i) wanted |= at(b, i, j) != NONE;
      if (!wanted) continue;
      const bf16 *keys = k + b * c.k.batch + g * c.k.head, *values = v + b * c.v.batch + g * c.v.head;
      load_tile(keys, c.k.row, j * TILE, c.S, c.K, KP, own.key + j * TILE * KP);
      load_tile(values, c.v.row, j * TILE, c.S, c.V, VP, own.rows);
      transpose<bf16>(own.rows, VP, TILE, VP, own.value + j * TILE * VP, TILE);
    }
  }

  Class at(int64_t b, int64_t i, int64_t j) const {
    return static_cast<Class>(classes[(b * c.query_tiles() + i) * c.key_tiles() + j]);
  }

  void attend(int64_t b, int64_t h, int64_t i, ForwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP();
    const float slope = scale * LOG2_E;
    alignas(64) float high[TILE], sum[TILE], shrink[TILE];
    uint64_t seen[TILE];
    std::fill_n(high, TILE, sink == nullptr ? -1e30f : sink[h] / scale);
    std::fill_n(sum, TILE, sink == nullptr ? 0.0f : 1.0f);
    load_tile(q + b * c.q.batch + h * c.q.head, c.q.row, i * TILE, c.T, c.K, KP, own.rows);
    pack_transposed<bf16>(own.rows, KP, KP, TILE, own.query);
    bool begun = false;
    for (int64_t j = 0; j < c.key_tiles(); ++j) {
      const Class kind = at(b, i, j);
      if (kind == NONE) continue;
      product(TILE, TILE, KP, own.key + j * TILE * KP, KP, own.query, own.score, TILE, false);
      if (kind == SOME) visible(c, mask, b, i * TILE, j * TILE, seen);
      const bool rose =
          kind == ALL ? soften<true>(own.score, seen, slope, high, sum, shrink, own.weight)
                      : soften<false>(own.score, seen, slope, high, sum, shrink, own.weight);
      if (begun && rose) multiply(own.out, shrink, VP);
      product(VP, TILE, TILE, own.value + j * TILE * VP, TILE, own.weight, own.out, TILE, begun);
      begun = true;
    }
    if (!begun) std::fill_n(own.out.data, VP * TILE, 0.0f);
    finish(b, h, i, slope, high, sum, own);
  }

  // Each query's column times its own factor.
  static void multiply(float* x, const float* factor, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < TILE; n += 16)
        store16(x + r * TILE + n, _mm512_mul_ps(load16(x + r * TILE + n), load16(factor + n)));
  }

  void finish(int64_t b, int64_t h, int64_t i, float slope, const float* high, float* sum,
              ForwardScratch& own) const {
    const int64_t VP = c.VP(), first = i * TILE;
    for (int64_t t = 0; t < std::min(TILE, c.T - first); ++t)
      lse[(b * c.H + h) * c.T + first + t] = sum[t] > 0 ? high[t] * slope + std::log2(sum[t]) : 0;
    for (int64_t t = 0; t < TILE; ++t) sum[t] = sum[t] > 0 ? 1 / sum[t] : 0;
    multiply(own.out, sum, VP);
    transpose<float>(own.out, TILE, VP, TILE, own.rows, VP);
    bf16* to = out + (b * c.T * c.H + h) * c.V;
    store_tile(own.rows, VP, c.V, to, c.H * c.V, first, c.T);
  }
};

// A tile of scores and one of dP, both [keys, queries], become weights and dS: rows of each, and dS packed.
template <bool WHOLE>
void differentiate(const float* score, const float* dweight, const uint64_t* seen, float slope,
                   const float* lse, const float* delta, bf16* weight, bf16* dscore, bf16* packed) {
  const __m512 slope16 = _mm512_set1_ps(slope);
  for (int64_t n = 0; n < TILE; n += 16) {
    const __m512 offset = load16(lse + n), mean = load16(delta + n);
    for (int64_t s = 0; s < TILE; s += 2) {
      const int64_t at = s * TILE + n;
      __m512 p[2], ds[2];
      for (int r = 0; r < 2; ++r) {
        const int64_t here = at + r * TILE;
        const __m512 off = _mm512_sub_ps(load16(dweight + here), mean);
        p[r] = exp2_16(_mm512_fmsub_ps(load16(score + here), slope16, offset));
        if (WHOLE) {
          ds[r] = _mm512_mul_ps(p[r], off);
        } else {
          const __mmask16 lanes = lanes16(seen, s + r, n);
          ds[r] = _mm512_maskz_mul_ps(lanes, p[r], off);
          p[r] = _mm512_maskz_mov_ps(lanes, p[r]);
        }
      }
      const __m512bh rows = _mm512_cvtne2ps_pbh(ds[1], ds[0]);
      store_rows(weight + at, weight + at + TILE, _mm512_cvtne2ps_pbh(p[1], p[0]));
      store_rows(dscore + at, dscore + at + TILE, rows);
      _mm512_storeu_si512(packed + s * TILE + 2 * n, pair_up(rows));
    }
  }
}

struct BackwardScratch {
  explicit BackwardScratch(const Call& c)
      : key(c.key_tiles() * TILE * c.KP()),
        key_across(c.key_tiles() * TILE * c.KP()),
        value(c.key_tiles() * TILE * c.VP()),
        query(c.query_tiles() * TILE * c.KP()),
        query_across(c.query_tiles() * TILE * c.KP()),
        dout(c.query_tiles() * TILE * c.VP()),
        dout_across(c.query_tiles() * TILE * c.VP()),
        dkey(c.key_tiles() * TILE * c.KP()),
        dvalue(c.key_tiles() * TILE * c.VP()),
        dquery(c.query_tiles() * TILE * c.KP()),
        lse(c.query_tiles() * TILE),
        delta(c.query_tiles() * TILE),
        score(AREA),
        dweight(AREA),
        weight(AREA),
        dscore(AREA),
        packed(AREA),
        rows(TILE * std::max(c.KP(), c.VP())) {}
  // Tiles: rows [keys, KP] and [keys, VP] and keys across [KP, keys]; of queries, packed ones.
  Buffer<bf16> key, key_across, value, query, query_across, dout, dout_across;
  Buffer<float> dkey, dvalue, dquery;  // dquery: tiles of [KP, queries]
  Buffer<float> lse, delta, score, dweight;
  Buffer<bf16> weight, dscore, packed, rows;
};

struct Backward {
  const Call& c;
  const bf16 *q, *k, *v, *dout, *out;
  const uint8_t* mask;
  const float* sink;
  const float* lse;
  float scale;
  const uint8_t* classes;
  bf16 *dq, *dk, *dv;
  float* dsink;

  void group(int64_t b, int64_t g, BackwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), keys = c.key_tiles() * TILE;
    for (int64_t j = 0; j < c.key_tiles(); ++j) {
      bf16* tile = own.key + j * TILE * KP;
      load_tile(k + b * c.k.batch + g * c.k.head, c.k.row, j * TILE, c.S, c.K, KP, tile);
      transpose<bf16>(tile, KP, TILE, KP, own.key_across + j * TILE * KP, TILE);
      load_tile(v + b * c.v.batch + g * c.v.head, c.v.row, j * TILE, c.S, c.V, VP,
                own.value + j * TILE * VP);
    }
    std::fill_n(own.dkey.data, keys * KP, 0.0f);
    std::fill_n(own.dvalue.data, keys * VP, 0.0f);
    for (int64_t h = g * c.group(); h < (g + 1) * c.group(); ++h) head(b, h, own);
    const int64_t at = b * c.S * c.G + g;
    for (int64_t j = 0; j < c.key_tiles(); ++j) {
      round(own.dkey + j * TILE * KP, scale, TILE * KP, own.rows);
      store_tile(own.rows, KP, c.K, dk + at * c.K, c.G * c.K, j * TILE, c.S);
      round(own.dvalue + j * TILE * VP, 1.0f, TILE * VP, own.rows);
      store_tile(own.rows, VP, c.V, dv + at * c.V, c.G * c.V, j * TILE, c.S);
    }
  }

  static void round(const float* x, float factor, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; i += 16)
      store16(out + i, _mm512_mul_ps(load16(x + i), _mm512_set1_ps(factor)));
  }

  void prepare(int64_t b, int64_t h, BackwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), padded = c.query_tiles() * TILE;
    const float* normaliser = lse + (b * c.H + h) * c.T;
    const bf16* dout_head = dout + b * c.dout.batch + h * c.dout.head;
    for (int64_t i = 0; i < c.query_tiles(); ++i) {
      load_tile(q + b * c.q.batch + h * c.q.head, c.q.row, i * TILE, c.T, c.K, KP, own.rows);
      pack<bf16>(own.rows, KP, TILE, KP, own.query + i * TILE * KP);
      pack_transposed<bf16>(own.rows, KP, KP, TILE, own.query_across + i * TILE * KP);
      load_tile(dout_head, c.dout.row, i * TILE, c.T, c.V, VP, own.rows);
      pack<bf16>(own.rows, VP, TILE, VP, own.dout + i * TILE * VP);
      pack_transposed<bf16>(own.rows, VP, VP, TILE, own.dout_across + i * TILE * VP);
    }
    for (int64_t t = 0; t < padded; ++t) {
      own.lse[t] = t < c.T ? normaliser[t] : 0;
      own.delta[t] = 0;
      if (t >= c.T) continue;
      const bf16 *a = dout_head + t * c.dout.row, *o = out + ((b * c.T + t) * c.H + h) * c.V;
      __m512 total = _mm512_setzero_ps();
      int64_t n = 0;
      for (; n + 16 <= c.V; n += 16) total = _mm512_fmadd_ps(load16(a + n), load16(o + n), total);
      if (n < c.V)
        total = _mm512_fmadd_ps(load_some(a + n, c.V - n), load_some(o + n, c.V - n), total);
      own.delta[t] = _mm512_reduce_add_ps(total);
    }
  }

  void head(int64_t b, int64_t h, BackwardScratch& own) const {
    const int64_t KP = c.KP();
    prepare(b, h, own);
    std::fill_n(own.dquery.data, c.query_tiles() * TILE * KP, 0.0f);
    for (int64_t j = 0; j < c.key_tiles(); ++j)
      for (int64_t i = 0; i < c.query_tiles(); ++i) {
        const uint8_t kind = classes[(b * c.query_tiles() + i) * c.key_tiles() + j];
        if (kind != NONE) meet(b, i, j, kind == ALL, own);
      }
    for (int64_t i = 0; i < c.query_tiles(); ++i) {
      float* tile = own.dquery + i * TILE * KP;
      for (int64_t n = 0; n < TILE * KP; n += 16)
        store16(tile + n, _mm512_mul_ps(load16(tile + n), _mm512_set1_ps(scale)));
      transpose<float>(tile, TILE, KP, TILE, own.rows, KP);
      bf16* to = dq + (b * c.T * c.H + h) * c.K;
      store_tile(own.rows, KP, c.K, to, c.H * c.K, i * TILE, c.T);
    }
    if (sink == nullptr) return;
    float total = 0;
    for (int64_t t = 0; t < c.T; ++t)
      total -= std::exp2(sink[h] * LOG2_E - own.lse[t]) * own.delta[t];
    dsink[b * c.H + h] = total;
  }

  // One tile of queries and one of keys: all five products.
  void meet(int64_t b, int64_t i, int64_t j, bool whole, BackwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), keys = j * TILE, queries = i * TILE;
    const float slope = scale * LOG2_E;
    const float *lse_i = own.lse + queries, *delta_i = own.delta + queries;
    uint64_t seen[TILE];
    product(TILE, TILE, KP, own.key + keys * KP, KP, own.query_across + queries * KP, own.score,
            TILE, false);
    product(TILE, TILE, VP, own.value + keys * VP, VP, own.dout_across + queries * VP, own.dweight,
            TILE, false);
    if (!whole) visible(c, mask, b, queries, keys, seen);
    auto step = whole ? differentiate<true> : differentiate<false>;
    step(own.score, own.dweight, seen, slope, lse_i, delta_i, own.weight, own.dscore, own.packed);
    product(TILE, VP, TILE, own.weight, TILE, own.dout + queries * VP, own.dvalue + keys * VP, VP,
            true);
    product(TILE, KP, TILE, own.dscore, TILE, own.query + queries * KP, own.dkey + keys * KP, KP,
            true);
    product(KP, TILE, TILE, own.key_across + keys * KP, TILE, own.packed,
            own.dquery + queries * KP, TILE, true);
  }
};

}  // namespace

// out[B,T,H,V], lse[B,H,T] (of base 2) and the classes of all tiles [B, queries, keys].
extern "C" void attention_forward(const Call* call, const bf16* q, const bf16* k, const bf16* v,
                                  const uint8_t* mask, const float* sink, float scale, bf16* out,
                                  float* lse, uint8_t* classes, int64_t threads) {
  const Call& c = *call;
  const int64_t I = c.query_tiles(), J = c.key_tiles();
  const auto nothing = [] { return 0; };
  parallel(threads, c.B * I, nothing, [&](int64_t task, int&) {
    for (int64_t j = 0; j < J; ++j)
      classes[task * J + j] = classify(c, mask, task / I, task % I * TILE, j * TILE);
  });
  const Forward forward{c, q, k, v, mask, sink, scale, classes, out, lse};
  // Keys are laid out once for 512 queries; of all heads that share them, if tasks are enough.
  const int64_t chunk = 8, chunks = (I + chunk - 1) / chunk;
  const int64_t heads = c.B * c.G * chunks < 2 * threads ? 1 : c.group();
  const int64_t parts = c.H / heads;
  const auto scratch = [&] { return std::make_unique<ForwardScratch>(c); };
  parallel(threads, c.B * parts * chunks, scratch, [&](int64_t task, auto& own) {
    // Late queries see most: they go first.
    const int64_t from = (chunks - 1 - task % chunks) * chunk, to = std::min(from + chunk, I);
    const int64_t b = task / chunks / parts, first = task / chunks % parts * heads;
    forward.prepare(b, first / c.group(), from, to, *own);
    for (int64_t h = first; h < first + heads; ++h)
      for (int64_t i = from; i < to; ++i) forward.attend(b, h, i, *own);
  });
}

extern "C" void attention_backward(const Call* call, const bf16* q, const bf16* k, const bf16* v,
                                   const uint8_t* mask, const float* sink, float scale,
                                   const bf16* out, const float* lse, const uint8_t* classes,
                                   const bf16* dout, bf16* dq, bf16* dk, bf16* dv, float* dsink,
                                   int64_t threads) {
  const Call& c = *call;
  const Backward backward{c,   q,   k,     v,       dout, out, mask, sink,
                          lse, scale, classes, dq, dk,  dv,   dsink};
  const auto scratch = [&] { return std::make_unique<BackwardScratch>(c); };
  parallel(threads, c.B * c.G, scratch, [&](int64_t task, auto& own) {
    backward.group(task / c.G, task % c.G, *own);
  });
}
