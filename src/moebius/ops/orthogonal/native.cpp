// Newton-Schulz, a matrix at a time on one thread, so that all of it stays in that core's cache.
//
// X is R x C with R <= C (read transposed where it is tall), both multiples of 32. Gram A = X X^T
// and map P = bA + cA^2 are symmetric: only blocks on and below the diagonal are computed, then
// mirrored. Operands are bf16, sums fp32, as in the torch path. All lie in blocks of 32 x 32, each
// row-major and contiguous: rows a power of two apart would share few sets of the cache. Right
// operands are packed a panel of 32 columns at a time, even columns before odd ones, so that
// neither packing them nor rounding sums to bf16 has to shuffle.
#include <cmath>

#include "amx.h"
#include "kernels.h"

using namespace moebius;

namespace {
constexpr int64_t BLOCK = Tiles::SIDE;
// How many values ahead a stream from memory is asked for, past where the CPU itself does so.
constexpr int64_t AHEAD = 512;

// Memory that will be read later, asked for a few cache lines at a time.
struct Later {
  const float *at = nullptr, *end = nullptr;

  void fetch() {
    for (int line = 0; line < 3 && at < end; ++line, at += 16) _mm_prefetch(at, _MM_HINT_T1);
  }
};

struct Scratch {
  Scratch(int64_t R, int64_t C)
      : x(R * C), gram(R * R), map(R * R), panel(C * BLOCK), sums(2 * BLOCK * BLOCK) {}
  Buffer<bf16> x, gram, map, panel;
  Buffer<float> sums;
  Later later;
  Tiles tiles;
};

struct Iteration {
  const double* polynomials;
  int64_t count;
  bool trace;  // divide by ||X||_F, else by margin * ||A||_F^(1/2)
  double margin, eps;
};

// The block at row i and column n of a matrix of `cols` columns.
int64_t place(int64_t i, int64_t n, int64_t cols) { return i * cols + n * BLOCK; }

// A row of a block in fp32.
struct Row {
  __m512 evens, odds;
};

inline Row load_row(const bf16* at) {
  const __m512i both = _mm512_loadu_si512(at);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
}

inline void store_row(bf16* at, Row row) {
  _mm512_storeu_si512(at, interleave_halves(_mm512_cvtne2ps_pbh(row.odds, row.evens)));
}

// each(m, row) for 8 rows of A B from `first` on, and one panel of B.
template <typename Each>
inline void tile(int64_t K, const bf16* a, const bf16* panel, int64_t first, Each each) {
  constexpr int ROWS = 8;
  Row sums[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sums[r] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t k = 0; k < K; k += 2) {
    const __m512bh evens = (__m512bh)_mm512_loadu_si512(panel + k * BLOCK);
    const __m512bh odds = (__m512bh)_mm512_loadu_si512(panel + k * BLOCK + BLOCK);
    const bf16* pairs = a + place(0, k - k % BLOCK, K) + first * BLOCK + k % BLOCK;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, pairs + r * BLOCK, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      sums[r].evens = _mm512_dpbf16_ps(sums[r].evens, both, evens);
      sums[r].odds = _mm512_dpbf16_ps(sums[r].odds, both, odds);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) each(first + r, sums[r]);
}

// each(at, row) for all rows of all blocks of A[rows, K] B[K, cols], `at` where a row lies; or for
// those of the blocks from the diagonal down. pack_block(k, n, out) packs a block of B. What a
// block's sums are for is done while the tiles are busy with the next block.
template <typename Pack, typename Each>
void products(int64_t rows, int64_t cols, bool lower, int64_t K, const bf16* a, Scratch& s,
              Pack pack_block, Each each) {
  const int64_t share = (BLOCK * 32 + K - 1) / K;  // of a block's rows, after every 32 of K
  float *sums = s.sums, *before = sums + BLOCK * BLOCK;
  int64_t pending = -1;  // the place of the block before
  const auto finish = [each](const float* block, int64_t at, int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) {
      const float* row = block + m * BLOCK;
      each(at + m * BLOCK, Row{load16(row), load16(row + 16)});
    }
  };
  for (int64_t n = 0; n < cols; n += BLOCK) {
    for (int64_t k = 0; k < K; k += BLOCK) pack_block(k, n, s.panel + k * BLOCK);
    for (int64_t i = lower ? n : 0; i < rows; i += BLOCK) {
      const int64_t at = place(i, n, cols);
      if (!Tiles::allowed) {
        for (int64_t m = 0; m < BLOCK; m += 8)
          tile(K, a + i * K, s.panel, m, [&](int64_t r, Row row) { each(at + r * BLOCK, row); });
        continue;
      }
      const int64_t due = pending < 0 ? 0 : BLOCK;
      s.tiles.product(K, a + i * K, s.panel, sums, [=, &s](int64_t k) {
        const int64_t from = k / 32 * share;
        finish(before, pending, from, std::min(from + share, due));
        s.later.fetch();
      });
      std::swap(sums, before);
      pending = at;
    }
  }
  if (pending >= 0) finish(before, pending, 0, BLOCK);
}

// Two rows of a block, interleaved: the even columns' pairs, the odd columns'.
struct Pairs {
  __m512i evens, odds;
};

inline Pairs load_two(const bf16* at, int64_t stride) {
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  const __m512i one = _mm512_loadu_si512(at), two = _mm512_loadu_si512(at + stride);
  const __m512i evens = _mm512_slli_epi32(two, 16), odds = _mm512_srli_epi32(one, 16);
  return {_mm512_ternarylogic_epi32(high, evens, one, 0xca),
          _mm512_ternarylogic_epi32(high, two, odds, 0xca)};
}

// A block as part of a panel.
void pack_rows(const bf16* block, bf16* out) {
  for (int64_t m = 0; m < BLOCK; m += 2) {
    const auto [evens, odds] = load_two(block + m * BLOCK, BLOCK);
    _mm512_storeu_si512(out + m * BLOCK, evens);
    _mm512_storeu_si512(out + m * BLOCK + BLOCK, odds);
  }
}

// A block, transposed, as part of a panel.
void pack_columns(const bf16* block, bf16* out) {
  __m512i words[16];
  for (int64_t odd = 0; odd < 2; ++odd) {
    load_pairs(block + odd * BLOCK, 2 * BLOCK, words);
    transpose_words(words);
    for (int64_t i = 0; i < 16; ++i)
      _mm512_storeu_si512(out + (2 * i + odd) * BLOCK, words[i]);
  }
}

// As `transpose`, without the shuffles by which it interleaves rows of other widths.
void transpose_block(const bf16* from, int64_t from_stride, bf16* to, int64_t to_stride) {
  __m512i evens[16], odds[16];
  for (int64_t m = 0; m < 16; ++m) {
    const Pairs pairs = load_two(from + 2 * m * from_stride, from_stride);
    evens[m] = pairs.evens, odds[m] = pairs.odds;
  }
  transpose_words(evens);
  transpose_words(odds);
  for (int64_t n = 0; n < 16; ++n) {
    _mm512_storeu_si512(to + 2 * n * to_stride, evens[n]);
    _mm512_storeu_si512(to + (2 * n + 1) * to_stride, odds[n]);
  }
}

// Copy what lies below the diagonal to above it.
void mirror(int64_t R, bf16* a) {
  for (int64_t i = 0; i < R; i += BLOCK)
    for (int64_t n = 0; n < i; n += BLOCK)
      transpose_block(a + place(i, n, R), BLOCK, a + place(n, i, R), BLOCK);
}

// A = X X^T.
void make_gram(int64_t R, int64_t C, Scratch& s) {
  const bf16* x = s.x;
  bf16* gram = s.gram;
  const auto pack = [=](int64_t k, int64_t n, bf16* out) { pack_columns(x + place(n, k, C), out); };
  products(R, R, true, C, x, s, pack, [=](int64_t at, Row row) { store_row(gram + at, row); });
  mirror(R, gram);
}

// P = bA + cA^2.
void make_map(int64_t R, double b, double c, Scratch& s) {
  const __m512 bs = _mm512_set1_ps(b), cs = _mm512_set1_ps(c);
  const bf16* gram = s.gram;
  bf16* map = s.map;
  const auto pack = [=](int64_t k, int64_t n, bf16* out) { pack_rows(gram + place(k, n, R), out); };
  products(R, R, true, R, gram, s, pack, [=](int64_t at, Row row) {
    const auto [evens, odds] = load_row(gram + at);
    store_row(map + at, {_mm512_fmadd_ps(cs, row.evens, _mm512_mul_ps(bs, evens)),
                         _mm512_fmadd_ps(cs, row.odds, _mm512_mul_ps(bs, odds))});
  });
  mirror(R, map);
}

// X <- aX + PX.
void apply_map(int64_t R, int64_t C, double a, Scratch& s) {
  const __m512 as = _mm512_set1_ps(a);
  bf16* x = s.x;
  const auto pack = [=](int64_t k, int64_t n, bf16* out) { pack_rows(x + place(k, n, C), out); };
  products(R, C, false, R, s.map, s, pack, [=](int64_t at, Row row) {
    const auto [evens, odds] = load_row(x + at);
    store_row(x + at, {_mm512_fmadd_ps(as, evens, row.evens), _mm512_fmadd_ps(as, odds, row.odds)});
  });
}

// What X is divided by, as factors: a power of two, which rounds nothing, and the rest.
struct Scale {
  double power, rest;
};

// Divide A by the bound of X, so far by its power of two alone.
Scale scale_gram(int64_t R, const Iteration& iteration, bf16* gram) {
  double trace = 0;
  for (int64_t i = 0; i < R; i += BLOCK)
    for (int64_t m = 0; m < BLOCK; ++m)
      trace += static_cast<float>(gram[place(i, i, R) + m * (BLOCK + 1)]);
  if (trace == 0) return {1, 1};  // zeros, which no eps, however small, may turn into NaN
  const double most = std::max(std::sqrt(trace), iteration.eps);
  const double power = std::exp2(-std::floor(std::log2(most)));
  const __m512 factor = _mm512_set1_ps(power * power);
  double total = 0;
  for (int64_t first = 0; first < R * R; first += BLOCK * BLOCK) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t at = first; at < first + BLOCK * BLOCK; at += BLOCK) {
      auto [evens, odds] = load_row(gram + at);
      evens = _mm512_mul_ps(evens, factor);
      odds = _mm512_mul_ps(odds, factor);
      squares = _mm512_fmadd_ps(evens, evens, _mm512_fmadd_ps(odds, odds, squares));
      store_row(gram + at, {evens, odds});
    }
    total += _mm512_reduce_add_ps(squares);
  }
  if (iteration.trace) return {power, 1 / (most * power)};
  const double size = iteration.margin * std::sqrt(std::sqrt(total));
  return {power, 1 / std::max(size, iteration.eps * power)};
}

// X itself is not divided: what it would be divided by goes into the first polynomial.
void iterate(int64_t R, int64_t C, const Iteration& iteration, Scratch& s) {
  for (int64_t k = 0; k < iteration.count; ++k) {
    const double* abc = iteration.polynomials + 3 * k;
    make_gram(R, C, s);
    const auto [power, rest] = k == 0 ? scale_gram(R, iteration, s.gram) : Scale{1, 1};
    make_map(R, abc[1] * std::pow(rest, 3) * power, abc[2] * std::pow(rest, 5) * power, s);
    apply_map(R, C, abc[0] * rest * power, s);
  }
}

void copy_block(const bf16* from, int64_t from_stride, bf16* to, int64_t to_stride) {
  for (int64_t m = 0; m < BLOCK; ++m)
    _mm512_storeu_si512(to + m * to_stride, _mm512_loadu_si512(from + m * from_stride));
}

// 32 rows of a matrix [., cols], from row `first` on, to their place in X, which is that matrix or,
// where it is tall, its transpose.
void strip_in(const bf16* strip, int64_t first, int64_t cols, bool tall, int64_t C, bf16* x) {
  for (int64_t n = 0; n < cols; n += BLOCK) {
    if (tall) transpose_block(strip + n, cols, x + place(n, first, C), BLOCK);
    else copy_block(strip + n, cols, x + place(first, n, C), BLOCK);
  }
}

// And back.
void strip_out(const bf16* x, int64_t first, int64_t cols, bool tall, int64_t C, bf16* strip) {
  for (int64_t n = 0; n < cols; n += BLOCK) {
    if (tall) transpose_block(x + place(n, first, C), BLOCK, strip + n, cols);
    else copy_block(x + place(first, n, C), BLOCK, strip + n, cols);
  }
}

// read(first, strip) gives 32 rows of a matrix, write(first, strip) takes them once orthogonal.
template <typename Read, typename Write>
void orthogonalise(int64_t rows, int64_t cols, const Iteration& iteration, Scratch& s, Read read,
                   Write write) {
  const bool tall = rows > cols;
  const int64_t R = std::min(rows, cols), C = std::max(rows, cols);
  for (int64_t first = 0; first < rows; first += BLOCK) {
    read(first, s.panel.data);
    strip_in(s.panel, first, cols, tall, C, s.x);
  }
  iterate(R, C, iteration, s);
  for (int64_t first = 0; first < rows; first += BLOCK) {
    strip_out(s.x, first, cols, tall, C, s.panel);
    write(first, s.panel.data);
  }
}

// Weight matrices with their gradients and momenta, all [number, rows, cols].
struct Stack {
  float* weight;
  const float* grad;
  float* momentum;
  int64_t number, rows, cols;
};

// Between two values, from the nearer one.
__m512 lerp16(__m512 a, __m512 b, double weight) {
  const __m512 apart = _mm512_sub_ps(b, a);
  return weight < 0.5 ? _mm512_fmadd_ps(_mm512_set1_ps(weight), apart, a)
                      : _mm512_fnmadd_ps(_mm512_set1_ps(1 - weight), apart, b);
}
}  // namespace

// Each matrix of a stack [M, rows, cols], in place.
extern "C" void orthogonal(bf16* stack, int64_t M, int64_t rows, int64_t cols,
                           const double* polynomials, int64_t count, int64_t trace, double margin,
                           double eps, int64_t threads) {
  const Iteration iteration{polynomials, count, trace != 0, margin, eps};
  const int64_t R = std::min(rows, cols), C = std::max(rows, cols);
  parallel(threads, M, [&] { return Scratch(R, C); }, [&](int64_t task, Scratch& s) {
    bf16* own = stack + task * rows * cols;
    const int64_t bytes = BLOCK * cols * sizeof(bf16);
    orthogonalise(
        rows, cols, iteration, s,
        [&](int64_t i, bf16* strip) { std::memcpy(strip, own + i * cols, bytes); },
        [&](int64_t i, const bf16* strip) { std::memcpy(own + i * cols, strip, bytes); });
  });
}

// Muon's whole step: move the momentum, w <- keep * w - rate * orthogonal(direction). Any shapes.
extern "C" void muon(const Stack* stacks, const double* rates, int64_t count_stacks, double keep,
                     double momentum, int64_t nesterov, const double* polynomials, int64_t count,
                     int64_t trace, double margin, double eps, int64_t threads) {
  const Iteration iteration{polynomials, count, trace != 0, margin, eps};
  struct Task {
    int64_t stack, matrix;
  };
  std::vector<Task> tasks;
  int64_t R = 0, C = 0;
  for (int64_t n = 0; n < count_stacks; ++n) {
    const Stack& own = stacks[n];
    for (int64_t m = 0; m < own.number; ++m) tasks.push_back({n, m});
    R = std::max(R, std::min(own.rows, own.cols));
    C = std::max(C, std::max(own.rows, own.cols));
  }
  const __m512 keeps = _mm512_set1_ps(keep);
  parallel(threads, tasks.size(), [&] { return Scratch(R, C); }, [&](int64_t task, Scratch& s) {
    const auto [stack, matrix] = tasks[task];
    const Stack& own = stacks[stack];
    const int64_t size = own.rows * own.cols, some = BLOCK * own.cols;
    float *weight = own.weight + matrix * size, *moment = own.momentum + matrix * size;
    const float* grad = own.grad + matrix * size;
    const auto direction = [&](int64_t first, bf16* strip) {
      for (int64_t n = first * own.cols, end = n + some; n < end; n += 16, strip += 16) {
        _mm_prefetch(grad + n + AHEAD, _MM_HINT_T0);
        _mm_prefetch(moment + n + AHEAD, _MM_HINT_T0);
        const __m512 given = load16(grad + n);
        const __m512 moved = lerp16(load16(moment + n), given, 1 - momentum);
        store16(moment + n, moved);
        store16(strip, nesterov != 0 ? lerp16(given, moved, momentum) : moved);
      }
    };
    const __m512 rate = _mm512_set1_ps(rates[stack]);
    const auto move = [&](int64_t first, const bf16* strip) {
      for (int64_t n = first * own.cols, end = n + some; n < end; n += 16, strip += 16) {
        _mm_prefetch(weight + n + AHEAD, _MM_HINT_T0);
        const __m512 kept = _mm512_mul_ps(keeps, load16(weight + n));
        store16(weight + n, _mm512_fnmadd_ps(rate, load16(strip), kept));
      }
    };
    s.later = {weight, weight + size};
    orthogonalise(own.rows, own.cols, iteration, s, direction, move);
  });
}
