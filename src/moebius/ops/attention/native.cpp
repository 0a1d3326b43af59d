// Attention in tiles of 64 queries x 64 keys (FlashAttention-2: Dao 2023), scores never in memory.
//
// Scores stand transposed, [keys, queries]: what belongs to a query (maximum, sum, delta) then runs
// across 16 lanes, weights go packed into the next product as they are made, and nothing inside the
// loops is ever transposed. Exponentials are of base 2: `slope` is scale * log2(e), and the
// normaliser kept for the backward is max * slope + log2(sum). A sink is a key without value, seen
// first.
//
// Letters: B batch, T queries, S keys, H query heads, G key heads, K and V widths of keys and
// values, KP and VP the same padded with zeros to multiples of 32.
#include <cmath>

#include "kernels.h"

using namespace moebius;

namespace {

constexpr int64_t TILE = 64, HALF = 32, AREA = TILE * TILE;
constexpr float LOG2_E = 1.44269504f;

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
  int64_t tile(int64_t b, int64_t i, int64_t j) const {
    return (b * query_tiles() + i) * key_tiles() + j;
  }
};

// What of a tile is visible: bit 2 * a + r for any key of half a and query of half r; all of it.
constexpr uint8_t NONE = 0, WHOLE = 16;

// A rectangle of a tile.
struct Part {
  int64_t key, keys, query, queries;
  int64_t at() const { return key * TILE + query; }             // in rows of 64
  int64_t packed() const { return key * TILE + 2 * query; }     // in pairs of rows
};

// The parts of a tile to compute: one, or one for each half of its keys.
struct Parts {
  explicit Parts(uint8_t kind) {
    const int first = kind & 3, second = kind >> 2 & 3;
    if (first == second) {
      add(0, TILE, first);
    } else {
      if (first) add(0, HALF, first);
      if (second) add(HALF, HALF, second);
    }
  }
  void add(int64_t key, int64_t keys, int halves) {
    part[count++] = {key, keys, halves == 2 ? HALF : 0, halves == 3 ? TILE : HALF};
  }
  const Part* begin() const { return part; }
  const Part* end() const { return part + count; }
  Part part[2];
  int count = 0;
};

// C[M,N] (+)= A[M,K] B[K,N]: a part of a tile that is packed as one panel.
inline void times(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t a_step, const bf16* b,
                  float* c, bool add) {
  at::native::cpublas::brgemm(M, N, K, a_step, TILE, TILE, add, a, b, c, true);
}

// C[M,N] += A[M,K] B[K,N]: B are K rows, from `row` on, of a tile [64, N] that is packed in panels.
inline void times_rows(int64_t M, int64_t N, int64_t K, const bf16* a, const bf16* tile,
                       int64_t row, float* c) {
  for (int64_t first = 0; first < N; first += PANEL) {
    const int64_t width = std::min(PANEL, N - first);
    at::native::cpublas::brgemm(M, width, K, TILE, width, N, true, a,
                                tile + first * TILE + row * width, c + first, true);
  }
}

struct View {
  const bf16* data;
  int64_t step;
};

// Rows [first, first + 64) of `rows`, with zeros around them: where they lie, or copied to `spare`.
View view_tile(const bf16* x, int64_t step, int64_t first, int64_t rows, int64_t width,
               int64_t padded, bf16* spare) {
  x += first * step;
  if (width == padded && first + TILE <= rows) return {x, step};
  copy_padded(x, step, std::min(TILE, rows - first), width, TILE, padded, spare);
  return {spare, padded};
}

// Ask for the same rows ahead of their use.
void fetch_tile(const bf16* x, int64_t step, int64_t first, int64_t rows, int64_t width) {
  fetch(x + first * step, step, std::min(TILE, rows - first), width);
}

// Rows of fp32 to bf16, up to `rows` of 64.
void round_tile(const float* tile, int64_t padded, int64_t width, bf16* x, int64_t step,
                int64_t first, int64_t rows) {
  for (int64_t i = 0; i < std::min(TILE, rows - first); ++i)
    for (int64_t n = 0; n < width; n += 16) {
      const __m512 values = load16(tile + i * padded + n);
      bf16* to = x + (first + i) * step + n;
      width - n >= 16 ? store16(to, values) : store_some(to, values, width - n);
    }
}

// The same from [padded, 64], by way of `spare` if need be.
void turn_tile(const float* tile, int64_t padded, int64_t width, bf16* x, int64_t step,
               int64_t first, int64_t rows, bf16* spare) {
  x += first * step;
  if (width == padded && first + TILE <= rows) {
    transpose<float>(tile, TILE, padded, TILE, x, step);
    return;
  }
  transpose<float>(tile, TILE, padded, TILE, spare, padded);
  for (int64_t i = 0; i < std::min(TILE, rows - first); ++i)
    std::memcpy(x + i * step, spare + i * padded, width * sizeof(bf16));
}

// Which keys of a tile a query sees, as bits.
inline uint64_t seen_by(const Call& c, const uint8_t* mask, int64_t b, int64_t t, int64_t key) {
  const int64_t inside = std::min(TILE, c.S - key);
  const __mmask64 lanes = inside == TILE ? ~0ull : (1ull << inside) - 1;
  const uint8_t* row = mask + b * c.mask_batch + t * c.mask_row + key;
  return _mm512_test_epi8_mask(_mm512_maskz_loadu_epi8(lanes, row), _mm512_set1_epi8(-1));
}

uint8_t classify(const Call& c, const uint8_t* mask, int64_t b, int64_t query, int64_t key) {
  uint64_t any[2] = {0, 0}, every = ~0ull;
  for (int64_t t = 0; t < TILE; ++t) {
    const uint64_t bits = query + t < c.T ? seen_by(c, mask, b, query + t, key) : 0;
    any[t / HALF] |= bits;
    every &= bits;
  }
  if (every == ~0ull) return WHOLE | 15;
  uint8_t kind = NONE;
  for (int r = 0; r < 2; ++r)
    kind |= (any[r] << HALF ? 1 << r : 0) | (any[r] >> HALF ? 4 << r : 0);
  return kind;
}

// Which queries of a tile see each of its keys: bit t of seen[s].
void visible(const Call& c, const uint8_t* mask, int64_t b, int64_t query, int64_t key,
             uint64_t* seen) {
  for (int64_t t = 0; t < TILE; ++t)
    seen[t] = query + t < c.T ? seen_by(c, mask, b, query + t, key) : 0;
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

// A part of scores becomes packed weights. The maximum (of scores) and the sum (of weights) of each
// query move on; `shrink` is what earlier sums are to be multiplied with. Whether any is below 1.
template <bool ALL>
bool soften(const Part& part, const float* score, const uint64_t* seen, float slope, float* high,
            float* sum, float* shrink, bf16* weight) {
  const __m512 slope16 = _mm512_set1_ps(slope);
  const int64_t end = part.key + part.keys;
  __mmask16 rose = 0;
  for (int64_t n = part.query; n < part.query + part.queries; n += 16) {
    const __m512 before = load16(high + n);
    __m512 top[4] = {before, before, before, before};
    for (int64_t s = part.key; s < end; s += 4)
      for (int r = 0; r < 4; ++r) {
        const __m512 x = load16(score + (s + r) * TILE + n);
        top[r] = ALL ? _mm512_max_ps(top[r], x)
                     : _mm512_mask_max_ps(top[r], lanes16(seen, s + r, n), top[r], x);
      }
    const __m512 now = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
    const __m512 less = exp2_16(_mm512_mul_ps(_mm512_sub_ps(before, now), slope16));
    const __m512 offset = _mm512_mul_ps(now, slope16);
    __m512 total = _mm512_mul_ps(load16(sum + n), less);
    for (int64_t s = part.key; s < end; s += 2) {
      const float* from = score + s * TILE + n;
      __m512 a = exp2_16(_mm512_fmsub_ps(load16(from), slope16, offset));
      __m512 b = exp2_16(_mm512_fmsub_ps(load16(from + TILE), slope16, offset));
      if (!ALL) {
        a = _mm512_maskz_mov_ps(lanes16(seen, s, n), a);
        b = _mm512_maskz_mov_ps(lanes16(seen, s + 1, n), b);
      }
      total = _mm512_add_ps(total, _mm512_add_ps(a, b));
      _mm512_storeu_si512(weight + s * TILE + 2 * n, interleave_halves(_mm512_cvtne2ps_pbh(b, a)));
    }
    rose |= _mm512_cmp_ps_mask(before, now, _CMP_LT_OQ);
    store16(high + n, now);
    store16(shrink + n, less);
    store16(sum + n, total);
  }
  return rose != 0;
}

// Each query's column times its own factor.
void multiply(float* x, const float* factor, int64_t rows, int64_t queries) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < queries; n += 16)
      store16(x + r * TILE + n, _mm512_mul_ps(load16(x + r * TILE + n), load16(factor + n)));
}

struct ForwardScratch {
  explicit ForwardScratch(const Call& c)
      : key(c.key_tiles() * TILE * c.KP()),
        value(c.key_tiles() * TILE * c.VP()),
        query(TILE * c.KP()),
        spare(TILE * std::max(c.KP(), c.VP())),
        weight(AREA),
        score(AREA),
        out(c.VP() * TILE),
        ready(c.key_tiles()) {}
  Buffer<bf16> key, value, query, spare, weight;  // value: tiles of [VP, keys]
  Buffer<float> score, out;                       // out: [VP, queries]
  Buffer<bool> ready;                             // tiles of keys
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

  // Keys as rows and values transposed, when the first query asks for them.
  void prepare(int64_t b, int64_t g, int64_t j, ForwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), first = j * TILE;
    const bf16 *keys = k + b * c.k.batch + g * c.k.head, *values = v + b * c.v.batch + g * c.v.head;
    copy_padded(keys + first * c.k.row, c.k.row, std::min(TILE, c.S - first), c.K, TILE, KP,
                own.key + first * KP);
    const View rows = view_tile(values, c.v.row, first, c.S, c.V, VP, own.spare);
    transpose<bf16>(rows.data, rows.step, TILE, VP, own.value + first * VP, TILE);
    fetch_tile(keys, c.k.row, first + TILE, c.S, c.K);
    fetch_tile(values, c.v.row, first + TILE, c.S, c.V);
    own.ready[j] = true;
  }

  void attend(int64_t b, int64_t h, int64_t i, ForwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP();
    const float slope = scale * LOG2_E;
    alignas(64) float high[TILE], sum[TILE], shrink[TILE];
    uint64_t seen[TILE];
    std::fill_n(high, TILE, sink == nullptr ? -1e30f : sink[h] / scale);
    std::fill_n(sum, TILE, sink == nullptr ? 0.0f : 1.0f);
    std::fill_n(own.out.data, VP * TILE, 0.0f);
    const bf16* queries = q + b * c.q.batch + h * c.q.head;
    const View rows = view_tile(queries, c.q.row, i * TILE, c.T, c.K, KP, own.spare);
    pack_transposed<bf16>(rows.data, rows.step, KP, TILE, own.query);
    fetch_tile(queries, c.q.row, i * TILE + TILE, c.T, c.K);
    bf16* to = out + (b * c.T * c.H + h) * c.V;
    fetch_tile(to, c.H * c.V, i * TILE, c.T, c.V);
    for (int64_t j = 0; j < c.key_tiles(); ++j) {
      const uint8_t kind = classes[c.tile(b, i, j)];
      if (kind == NONE) continue;
      if (!own.ready[j]) prepare(b, h / c.group(), j, own);
      const bf16 *key = own.key + j * TILE * KP, *value = own.value + j * TILE * VP;
      const auto step = kind & WHOLE ? soften<true> : soften<false>;
      if (!(kind & WHOLE)) visible(c, mask, b, i * TILE, j * TILE, seen);
      for (const Part& part : Parts(kind)) {
        times(part.keys, part.queries, KP, key + part.key * KP, KP, own.query + 2 * part.query,
              own.score + part.at(), false);
        float* sums = own.out + part.query;
        if (step(part, own.score, seen, slope, high, sum, shrink, own.weight))
          multiply(sums, shrink + part.query, VP, part.queries);
        times(VP, part.queries, part.keys, value + part.key, TILE, own.weight + part.packed(), sums,
              true);
      }
    }
    const int64_t first = i * TILE, count = std::min(TILE, c.T - first);
    float* normaliser = lse + (b * c.H + h) * c.T + first;
    for (int64_t t = 0; t < count; ++t)
      normaliser[t] = sum[t] > 0 ? high[t] * slope + std::log2(sum[t]) : 0;
    for (int64_t t = 0; t < TILE; ++t) sum[t] = sum[t] > 0 ? 1 / sum[t] : 0;
    multiply(own.out, sum, VP, TILE);
    turn_tile(own.out, VP, c.V, to, c.H * c.V, first, c.T, own.spare);
  }
};

// A part of scores and one of dP become weights and scale * dS: rows of each, and dS packed.
// `delta` is the query's sum over keys of weight * dP, times scale.
template <bool ALL>
void differentiate(const Part& part, const float* score, const float* dweight, const uint64_t* seen,
                   float scale, const float* lse, const float* delta, bf16* weight, bf16* dscore,
                   bf16* packed) {
  const __m512 slope16 = _mm512_set1_ps(scale * LOG2_E), scale16 = _mm512_set1_ps(scale);
  for (int64_t n = part.query; n < part.query + part.queries; n += 16) {
    const __m512 offset = load16(lse + n), mean = load16(delta + n);
    for (int64_t s = part.key; s < part.key + part.keys; s += 2) {
      const int64_t at = s * TILE + n;
      __m512 p[2], ds[2];
      for (int r = 0; r < 2; ++r) {
        const int64_t here = at + r * TILE;
        const __m512 off = _mm512_fmsub_ps(load16(dweight + here), scale16, mean);
        p[r] = exp2_16(_mm512_fmsub_ps(load16(score + here), slope16, offset));
        if (ALL) {
          ds[r] = _mm512_mul_ps(p[r], off);
        } else {
          const __mmask16 lanes = lanes16(seen, s + r, n);
          ds[r] = _mm512_maskz_mul_ps(lanes, p[r], off);
          p[r] = _mm512_maskz_mov_ps(lanes, p[r]);
        }
      }
      const __m512bh rows = _mm512_cvtne2ps_pbh(ds[1], ds[0]);
      store_halves(weight + at, weight + at + TILE, _mm512_cvtne2ps_pbh(p[1], p[0]));
      store_halves(dscore + at, dscore + at + TILE, rows);
      _mm512_storeu_si512(packed + s * TILE + 2 * n, interleave_halves(rows));
    }
  }
}

struct BackwardScratch {
  explicit BackwardScratch(const Call& c)
      : BackwardScratch(c, c.query_tiles() * TILE, c.group() == 1 ? TILE : c.key_tiles() * TILE) {}
  BackwardScratch(const Call& c, int64_t queries, int64_t keys)
      : key(keys * c.KP()),
        key_across(keys * c.KP()),
        value(keys * c.VP()),
        query(queries * c.KP()),
        query_across(queries * c.KP()),
        dout(queries * c.VP()),
        dout_across(queries * c.VP()),
        weight(AREA),
        dscore(AREA),
        packed(AREA),
        spare(TILE * std::max(c.KP(), c.VP())),
        dkey(keys * c.KP()),
        dvalue(keys * c.VP()),
        dquery(queries * c.KP()),
        lse(queries),
        delta(queries),
        score(AREA),
        dweight(AREA),
        ready(c.query_tiles()) {}
  // Tiles, of keys only one where no heads share them. Of keys and values rows, and keys across
  // [KP, keys]; of queries and dO packed ones.
  Buffer<bf16> key, key_across, value, query, query_across, dout, dout_across;
  Buffer<bf16> weight, dscore, packed, spare;
  Buffer<float> dkey, dvalue, dquery;  // dquery: tiles of [KP, queries]
  Buffer<float> lse, delta, score, dweight;
  Buffer<bool> ready;  // tiles of queries
};

struct Backward {
  const Call& c;
  const bf16 *q, *k, *v, *dout, *out;
  const uint8_t* mask;
  const float *sink, *lse;
  float scale;
  const uint8_t* classes;
  bf16 *dq, *dk, *dv;
  float* dsink;

  // A key head with all the query heads that share it, one after the other.
  void group(int64_t b, int64_t g, BackwardScratch& own) const {
    const int64_t from = g * c.group(), to = from + c.group();
    for (int64_t h = from; h < to; ++h) {
      std::fill_n(own.ready.data, c.query_tiles(), false);
      for (int64_t j = 0; j < c.key_tiles(); ++j) {
        if (h == from) begin_keys(b, g, j, own);
        for (int64_t i = 0; i < c.query_tiles(); ++i) {
          if (classes[c.tile(b, i, j)] == NONE) continue;
          if (!own.ready[i]) begin_queries(b, h, i, own);
          meet(b, i, j, own);
        }
        if (h + 1 == to) end_keys(b, g, j, own);
      }
      end_queries(b, h, own);
    }
  }

  // Where a tile of keys stands in the scratch.
  int64_t keys_at(int64_t j) const { return c.group() == 1 ? 0 : j * TILE; }

  void begin_keys(int64_t b, int64_t g, int64_t j, BackwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), first = j * TILE, at = keys_at(j);
    const int64_t rows = std::min(TILE, c.S - first);
    const bf16 *keys = k + b * c.k.batch + g * c.k.head, *values = v + b * c.v.batch + g * c.v.head;
    copy_padded(keys + first * c.k.row, c.k.row, rows, c.K, TILE, KP, own.key + at * KP);
    transpose<bf16>(own.key + at * KP, KP, TILE, KP, own.key_across + at * KP, TILE);
    copy_padded(values + first * c.v.row, c.v.row, rows, c.V, TILE, VP, own.value + at * VP);
    std::fill_n(own.dkey + at * KP, TILE * KP, 0.0f);
    std::fill_n(own.dvalue + at * VP, TILE * VP, 0.0f);
    fetch_tile(keys, c.k.row, first + TILE, c.S, c.K);
    fetch_tile(values, c.v.row, first + TILE, c.S, c.V);
    const int64_t to = b * c.S * c.G + g;
    fetch_tile(dk + to * c.K, c.G * c.K, first, c.S, c.K);
    fetch_tile(dv + to * c.V, c.G * c.V, first, c.S, c.V);
  }

  void end_keys(int64_t b, int64_t g, int64_t j, BackwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), first = j * TILE, at = keys_at(j);
    const int64_t to = b * c.S * c.G + g;
    round_tile(own.dkey + at * KP, KP, c.K, dk + to * c.K, c.G * c.K, first, c.S);
    round_tile(own.dvalue + at * VP, VP, c.V, dv + to * c.V, c.G * c.V, first, c.S);
  }

  void begin_queries(int64_t b, int64_t h, int64_t i, BackwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), first = i * TILE;
    const bf16* dout_head = dout + b * c.dout.batch + h * c.dout.head;
    const bf16* query_head = q + b * c.q.batch + h * c.q.head;
    const bf16* out_head = out + (b * c.T * c.H + h) * c.V;
    View rows = view_tile(query_head, c.q.row, first, c.T, c.K, KP, own.spare);
    pack<bf16>(rows.data, rows.step, TILE, KP, own.query + first * KP);
    pack_transposed<bf16>(rows.data, rows.step, KP, TILE, own.query_across + first * KP);
    rows = view_tile(dout_head, c.dout.row, first, c.T, c.V, VP, own.spare);
    pack<bf16>(rows.data, rows.step, TILE, VP, own.dout + first * VP);
    pack_transposed<bf16>(rows.data, rows.step, VP, TILE, own.dout_across + first * VP);
    for (int64_t t = first; t < first + TILE; ++t) {
      own.lse[t] = t < c.T ? lse[(b * c.H + h) * c.T + t] : 0;
      own.delta[t] =
          t < c.T ? scale * dot(dout_head + t * c.dout.row, out_head + t * c.H * c.V, c.V) : 0;
    }
    std::fill_n(own.dquery + first * KP, TILE * KP, 0.0f);
    fetch_tile(query_head, c.q.row, first + TILE, c.T, c.K);
    fetch_tile(dout_head, c.dout.row, first + TILE, c.T, c.V);
    fetch_tile(out_head, c.H * c.V, first + TILE, c.T, c.V);
    own.ready[i] = true;
  }

  void end_queries(int64_t b, int64_t h, BackwardScratch& own) const {
    const int64_t KP = c.KP();
    bf16* to = dq + (b * c.T * c.H + h) * c.K;
    for (int64_t i = 0; i < c.query_tiles(); ++i) {
      if (!own.ready[i]) begin_queries(b, h, i, own);
      fetch_tile(to, c.H * c.K, (i + 1) * TILE, c.T, c.K);
      turn_tile(own.dquery + i * TILE * KP, KP, c.K, to, c.H * c.K, i * TILE, c.T, own.spare);
    }
    if (sink == nullptr) return;
    float total = 0;
    for (int64_t t = 0; t < c.T; ++t)
      total -= std::exp2(sink[h] * LOG2_E - own.lse[t]) * own.delta[t];
    dsink[b * c.H + h] = total / scale;
  }

  // One tile of queries and one of keys: all five products.
  void meet(int64_t b, int64_t i, int64_t j, BackwardScratch& own) const {
    const int64_t KP = c.KP(), VP = c.VP(), keys = keys_at(j), queries = i * TILE;
    const uint8_t kind = classes[c.tile(b, i, j)];
    uint64_t seen[TILE];
    if (!(kind & WHOLE)) visible(c, mask, b, queries, j * TILE, seen);
    const auto step = kind & WHOLE ? differentiate<true> : differentiate<false>;
    for (const Part& part : Parts(kind)) {
      const int64_t key = keys + part.key, at = part.at(), packed = part.packed();
      times(part.keys, part.queries, KP, own.key + key * KP, KP,
            own.query_across + queries * KP + 2 * part.query, own.score + at, false);
      times(part.keys, part.queries, VP, own.value + key * VP, VP,
            own.dout_across + queries * VP + 2 * part.query, own.dweight + at, false);
      step(part, own.score, own.dweight, seen, scale, own.lse + queries, own.delta + queries,
           own.weight, own.dscore, own.packed);
      times_rows(part.keys, VP, part.queries, own.weight + at, own.dout + queries * VP, part.query,
                 own.dvalue + key * VP);
      times_rows(part.keys, KP, part.queries, own.dscore + at, own.query + queries * KP, part.query,
                 own.dkey + key * KP);
      times(KP, part.queries, part.keys, own.key_across + keys * KP + part.key, TILE,
            own.packed + packed, own.dquery + queries * KP + part.query, true);
    }
  }
};

}  // namespace

// out[B,T,H,V], lse[B,H,T] (of base 2) and what is visible of all tiles [B, queries, keys].
extern "C" void attention_forward(const Call* call, const bf16* q, const bf16* k, const bf16* v,
                                  const uint8_t* mask, const float* sink, float scale, bf16* out,
                                  float* lse, uint8_t* classes, int64_t threads) {
  const Call& c = *call;
  const int64_t I = c.query_tiles(), J = c.key_tiles();
  parallel(threads, c.B * I, [] { return 0; }, [&](int64_t task, int&) {
    for (int64_t j = 0; j < J; ++j)
      classes[task * J + j] = classify(c, mask, task / I, task % I * TILE, j * TILE);
  });
  const Forward forward{c, q, k, v, mask, sink, scale, classes, out, lse};
  // Keys are laid out once for 512 queries; of all heads that share them, if tasks are enough.
  const int64_t chunk = 8, chunks = (I + chunk - 1) / chunk;
  const int64_t heads = c.B * c.G * chunks < 2 * threads ? 1 : c.group(), parts = c.H / heads;
  const auto scratch = [&] { return std::make_unique<ForwardScratch>(c); };
  parallel(threads, c.B * parts * chunks, scratch, [&](int64_t task, auto& own) {
    const int64_t from = task % chunks * chunk, to = std::min(from + chunk, I);
    const int64_t b = task / chunks / parts, first = task / chunks % parts * heads;
    std::fill_n(own->ready.data, J, false);
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
  const Backward backward{c,   q,     k,       v,  dout, out, mask, sink,
                          lse, scale, classes, dq, dk,   dv,  dsink};
  const auto scratch = [&] { return std::make_unique<BackwardScratch>(c); };
  parallel(threads, c.B * c.G, scratch, [&](int64_t task, auto& own) {
    backward.group(task / c.G, task % c.G, *own);
  });
}
