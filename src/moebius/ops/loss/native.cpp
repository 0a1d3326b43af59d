// Cross-entropy of a linear head: the loss and the gradients of a unit loss, in one pass of tokens.
//
// Tokens come in chunks. First every thread takes tiles of ROWS tokens: their logits, panel by panel,
// become exp(logit - the largest so far) while they lie in the cache; once the sum is known they are
// scaled to p - onehot in bf16, which gives the tile's dh at once and is kept, packed, for dW. Then
// every thread takes panels of W and adds the chunk's h^T (p - onehot) to them. The order of every sum
// depends neither on the number of threads nor on who comes first.
#include <cmath>

#include "kernels.h"

using namespace moebius;

namespace {

constexpr int64_t ROWS = 64;    // tokens of a tile
constexpr int64_t BLOCK = 512;  // columns of V of one product for dh
constexpr int64_t DEPTH = 512;  // tokens of one product for dW

struct Sizes {
  int64_t count, D, V, panels, threads, chunk;
};

// The weight as both products want it, V filled up with zeros to whole panels.
struct Weight {
  explicit Weight(const Sizes& s)
      : transposed(s.panels * PANEL * s.D), plain(s.panels * PANEL * s.D) {}
  Buffer<bf16> transposed, plain;
};

// What a chunk's tiles leave behind for dW, in sub-chunks of DEPTH tokens.
struct Chunk {
  explicit Chunk(const Sizes& s, bool used)
      : h(used ? s.chunk * s.D : 1), grad(used ? s.chunk * s.panels * PANEL : 1) {}
  Buffer<bf16> h, grad;  // [D][DEPTH], and panels [DEPTH/2][PANEL][2]
};

struct Tile {
  explicit Tile(const Sizes& s)
      : h(ROWS * s.D), logits(ROWS * s.panels * PANEL), highest(ROWS * s.panels), dh(ROWS * s.D) {}
  Buffer<bf16> h;
  Buffer<float> logits, highest;  // a panel after the other
  Buffer<float> dh;
  alignas(64) float top[ROWS], sums[ROWS][16], log_sum[ROWS], at_target[ROWS];
  alignas(64) bf16 grad[ROWS * BLOCK];
  int64_t target[ROWS];
};

int64_t panel_width(const Sizes& s, int64_t panel) { return std::min(PANEL, s.V - panel * PANEL); }

// Pack a panel of W^T, and the same rows of W, in blocks of BLOCK rows (the last one shorter).
void pack_panel(const Sizes& s, const float* w, int64_t panel, bool gradients, Weight& out) {
  const int64_t width = panel_width(s, panel), D = s.D;
  const float* from = w + panel * PANEL * D;
  Buffer<float> filled(width < PANEL ? PANEL * D : 1);
  if (width < PANEL) {
    std::memset(filled, 0, PANEL * D * sizeof(float));
    std::memcpy(filled, from, width * D * sizeof(float));
    from = filled;
  }
  pack_transposed(from, D, D, PANEL, out.transposed + panel * PANEL * D);
  if (!gradients) return;
  const int64_t block = panel * PANEL / BLOCK * BLOCK;
  const int64_t deep = std::min(BLOCK, s.panels * PANEL - block);
  bf16* to = out.plain + block * D;
  for (int64_t first = 0; first < D; first += PANEL) {
    const int64_t columns = std::min(PANEL, D - first);
    pack(from + first, D, PANEL, columns, to + first * deep + (panel * PANEL - block) * columns);
  }
}

// One panel of logits becomes exp(logit - top), where top is the largest logit of its row so far.
void exponentials(const Sizes& s, int64_t panel, Tile& tile) {
  float* logits = tile.logits + panel * ROWS * PANEL;
  const int64_t width = panel_width(s, panel);
  for (int64_t row = 0; row < ROWS; ++row) {
    float* x = logits + row * PANEL;
    std::fill(x + width, x + PANEL, -INFINITY);
    const int64_t at = tile.target[row] - panel * PANEL;
    if (at >= 0 && at < width) tile.at_target[row] = x[at];
  }
  for (int64_t first = 0; first < ROWS; first += 16) {
    alignas(64) float largest[16], shrink[16];
    for (int64_t i = 0; i < 16; ++i) {
      const float* x = logits + (first + i) * PANEL;
      const __m512 a = load16(x), b = load16(x + 16), c = load16(x + 32), d = load16(x + 48);
      largest[i] = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)));
      // Neither the maximum nor exp16 hands on a NaN; the sum does.
      if (_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q))
        tile.sums[first + i][0] = NAN;
    }
    const __m512 before = load16(tile.top + first);
    const __m512 top = _mm512_max_ps(before, load16(largest));
    store16(shrink, exp16(_mm512_sub_ps(before, top)));
    store16(tile.top + first, top);
    store16(tile.highest + panel * ROWS + first, top);
    for (int64_t i = 0; i < 16; ++i) {
      float* x = logits + (first + i) * PANEL;
      float* sums = tile.sums[first + i];
      const __m512 shift = _mm512_set1_ps(tile.top[first + i]);
      __m512 sum = _mm512_mul_ps(load16(sums), _mm512_set1_ps(shrink[i]));
      for (int64_t v = 0; v < PANEL; v += 16) {
        const __m512 y = exp16(_mm512_sub_ps(load16(x + v), shift));
        store16(x + v, y);
        sum = _mm512_add_ps(sum, y);
      }
      store16(sums, sum);
    }
  }
}

// Two rows of 16 values, scaled, as bf16: each on its own, and interleaved where `packed` is given.
inline void store_rows(const float* x, __m512 scale_a, __m512 scale_b, bf16* a, bf16* b,
                       bf16* packed) {
  store16(a, _mm512_mul_ps(load16(x), scale_a));
  store16(b, _mm512_mul_ps(load16(x + PANEL), scale_b));
  if (packed != nullptr) _mm512_storeu_si512(packed, interleave16(a, b));
}

// The exponentials of one panel become p - onehot, in bf16: by row, and packed where `packed` is
// given. Rows without a token become 0.
void gradient(int64_t panel, int64_t rows, const Tile& tile, bf16* out, int64_t stride,
              bf16* packed) {
  const float* x = tile.logits.data + panel * ROWS * PANEL;
  const float* highest = tile.highest.data + panel * ROWS;
  alignas(64) float scale[ROWS];
  for (int64_t row = 0; row < ROWS; row += 16) {
    const __m512 log_sum = load16(tile.log_sum + row);
    const __m512 factor = exp16(_mm512_sub_ps(load16(highest + row), log_sum));
    const __mmask16 lost = _mm512_cmp_ps_mask(log_sum, log_sum, _CMP_UNORD_Q);
    store16(scale + row, _mm512_mask_mov_ps(factor, lost, log_sum));
  }
  std::fill(scale + rows, scale + ROWS, 0.0f);
  for (int64_t row = 0; row < ROWS; row += 2) {
    const __m512 even = _mm512_set1_ps(scale[row]), odd = _mm512_set1_ps(scale[row + 1]);
    for (int64_t v = 0; v < PANEL; v += 16) {
      bf16* to = out + row * stride + v;
      bf16* pairs = packed == nullptr ? nullptr : packed + row * PANEL + 2 * v;
      store_rows(x + row * PANEL + v, even, odd, to, to + stride, pairs);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = tile.target[row] - panel * PANEL;
    if (at < 0 || at >= PANEL) continue;
    const bf16 value = static_cast<bf16>(x[row * PANEL + at] * scale[row] - 1.0f);
    out[row * stride + at] = value;
    if (packed != nullptr) packed[(row - row % 2) * PANEL + 2 * at + row % 2] = value;
  }
}

// The loss of each token of a tile.
void losses(const Sizes& s, const Weight& w, int64_t rows, Tile& tile, double* nll) {
  std::fill(tile.top, tile.top + ROWS, -INFINITY);
  std::memset(tile.sums, 0, sizeof(tile.sums));
  for (int64_t panel = 0; panel < s.panels; ++panel) {
    const bf16* packed = w.transposed.data + panel * PANEL * s.D;
    float* logits = tile.logits + panel * ROWS * PANEL;
    product(ROWS, PANEL, s.D, tile.h, s.D, packed, logits, PANEL, false);
    exponentials(s, panel, tile);
  }
  for (int64_t row = 0; row < ROWS; ++row) {
    double sum = 0;
    for (const float part : tile.sums[row]) sum += part;
    const double log_sum = tile.top[row] + std::log(sum);
    tile.log_sum[row] = static_cast<float>(log_sum);
    if (row < rows) nll[row] = log_sum - tile.at_target[row];
  }
}

// dh of a tile; p - onehot goes, packed, to the tile's place `first` in its chunk.
void tile_gradients(const Sizes& s, const Weight& w, int64_t first, int64_t rows, Tile& tile,
                    Chunk& chunk, bool weight_too) {
  const int64_t columns = s.panels * PANEL, sub = first / DEPTH, within = first % DEPTH;
  for (int64_t block = 0; block < columns; block += BLOCK) {
    const int64_t deep = std::min(BLOCK, columns - block);
    for (int64_t v = 0; v < deep; v += PANEL) {
      const int64_t panel = (block + v) / PANEL;
      const int64_t place = ((sub * s.panels + panel) * DEPTH + within) * PANEL;
      bf16* packed = weight_too ? chunk.grad + place : nullptr;
      gradient(panel, rows, tile, tile.grad + v, deep, packed);
    }
    product(ROWS, s.D, deep, tile.grad, deep, w.plain.data + block * s.D, tile.dh, s.D, block > 0);
  }
  if (!weight_too) return;
  transpose(tile.h.data, s.D, ROWS, s.D, chunk.h + sub * DEPTH * s.D + within, DEPTH);
}

// Add a chunk's h^T (p - onehot) to one panel of dW, kept as [D][PANEL] until the last chunk.
void add_weight_gradient(const Sizes& s, const Chunk& chunk, int64_t rows, int64_t panel,
                         bool begins, float* sum) {
  for (int64_t first = 0; first < rows; first += DEPTH) {
    const int64_t sub = first / DEPTH, deep = round_up(std::min(DEPTH, rows - first), ROWS);
    const bf16* grad = chunk.grad.data + (sub * s.panels + panel) * DEPTH * PANEL;
    product(s.D, PANEL, deep, chunk.h.data + sub * DEPTH * s.D, DEPTH, grad, sum, PANEL,
            !begins || first > 0);
  }
}

// out[columns, D] = x[D, PANEL] transposed, fp32.
void transpose_panel(const float* x, int64_t D, int64_t columns, float* out) {
  __m512i words[16];
  for (int64_t d = 0; d < D; d += 16)
    for (int64_t v = 0; v < columns; v += 16) {
      for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(x + (d + i) * PANEL + v);
      transpose_words(words);
      for (int64_t i = 0; i < std::min<int64_t>(16, columns - v); ++i)
        _mm512_storeu_si512(out + (v + i) * D + d, words[i]);
    }
}

// The tokens `index[begin...]` of a tile; a tile without so many is filled up with zeros.
void gather(const Sizes& s, const bf16* h, const int64_t* target, const int64_t* index,
            int64_t rows, Tile& tile) {
  for (int64_t row = 0; row < ROWS; ++row) {
    tile.target[row] = row < rows ? target[index[row]] : -1;
    bf16* to = tile.h + row * s.D;
    if (row < rows)
      std::memcpy(to, h + index[row] * s.D, s.D * sizeof(bf16));
    else
      std::memset(to, 0, s.D * sizeof(bf16));
  }
}

}  // namespace

// The sum of the losses of the `count` tokens listed in `index`; their rows of dh[N,D], and dW[V,D]
// (either may be null). D a multiple of 32. The targets must lie in [0, V).
extern "C" double head_cross_entropy(const bf16* h, const float* w, const int64_t* target,
                                     const int64_t* index, int64_t count, int64_t D, int64_t V,
                                     bf16* dh, float* dw, int64_t threads) {
  const int64_t chunk_rows = round_up(std::min(count, 2 * ROWS * threads), DEPTH);
  const Sizes s{count, D, V, round_up(V, PANEL) / PANEL, threads, chunk_rows};
  const bool gradients = dh != nullptr || dw != nullptr;
  Weight weight(s);
  Chunk chunk(s, dw != nullptr);
  Buffer<float> sums(dw != nullptr ? s.panels * PANEL * D : 1);
  std::vector<double> nll(count);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    Tile tile(s);
#pragma omp for schedule(dynamic, 4)
    for (int64_t panel = 0; panel < s.panels; ++panel) pack_panel(s, w, panel, gradients, weight);
    for (int64_t begin = 0; begin < count; begin += s.chunk) {
      const int64_t rows = std::min(s.chunk, count - begin);
#pragma omp for schedule(dynamic, 1)
      for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t some = std::min(ROWS, rows - first);
        const int64_t* which = index + begin + first;
        gather(s, h, target, which, some, tile);
        losses(s, weight, some, tile, nll.data() + begin + first);
        if (!gradients) continue;
        tile_gradients(s, weight, first, some, tile, chunk, dw != nullptr);
        for (int64_t row = 0; dh != nullptr && row < some; ++row)
          for (int64_t d = 0; d < D; d += 16)
            store16(dh + which[row] * D + d, load16(tile.dh + row * D + d));
      }
      if (dw == nullptr) continue;
#pragma omp for schedule(dynamic, 1)
      for (int64_t panel = 0; panel < s.panels; ++panel) {
        float* sum = sums + panel * PANEL * D;
        add_weight_gradient(s, chunk, rows, panel, begin == 0, sum);
        if (begin + rows == count)
          transpose_panel(sum, D, panel_width(s, panel), dw + panel * PANEL * D);
      }
    }
    at::native::cpublas::brgemm_release();
  }
  double total = 0;
  for (const double one : nll) total += one;
  return total;
}
