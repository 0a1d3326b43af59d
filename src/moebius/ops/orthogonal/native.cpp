// Newton-Schulz, a matrix at a time on one thread, so that all of it stays in that core's cache.
//
// X is R x C with R <= C (read transposed where it is tall), both multiples of 32. Gram A = X X^T and
// map P = bA + cA^2 are symmetric: only tiles on and below the diagonal are computed, then mirrored.
// Operands are bf16, sums fp32, as in the torch path.
#include <cmath>

#include "kernels.h"

using namespace moebius;
using at::native::cpublas::brgemm;

namespace {
constexpr int64_t BLOCK = 32;

struct Scratch {
  Scratch(int64_t most, int64_t most_rows, int64_t most_cols)
      : x(most), packed(most), gram(most_rows * most_rows), map(most_rows * most_rows),
        panel(most_cols * BLOCK), sums(most_rows * BLOCK) {}
  Buffer<bf16> x, packed, gram, map, panel;
  Buffer<float> sums;
};

struct Iteration {
  const double* polynomials;
  int64_t count;
  bool trace;  // divide by ||X||_F, else by margin * ||A||_F^(1/2)
  double margin, eps;
};

// each(i, n, sums) for the sums of 8 rows and 32 columns of A B, 16 at a time; i is the first row.
template <typename Each>
inline void tile(int64_t K, const bf16* a, const bf16* panel, int64_t i, Each each) {
  constexpr int ROWS = 8;
  __m512 sums[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(panel + k * BLOCK);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + k * BLOCK + 32);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + (i + r) * K + k, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
      sums[r][0] = _mm512_dpbf16_ps(sums[r][0], left, first);
      sums[r][1] = _mm512_dpbf16_ps(sums[r][1], left, second);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    each(i + r, 0, sums[r][0]);
    each(i + r, 16, sums[r][1]);
  }
}

// each(i, n, sums) for the rows from..to of A[., K] times a panel of 32 columns. Tiles written out
// spare a tenth of brgemm's time, as their sums go on from registers; AMX is worth more than that.
template <typename Each>
void product_rows(int64_t from, int64_t to, int64_t K, const bf16* a, Scratch& s, Each each) {
#ifdef __AMX_BF16__
  brgemm(to - from, BLOCK, K, K, BLOCK, BLOCK, false, a + from * K, s.panel, s.sums, true);
  for (int64_t i = from; i < to; ++i)
    for (int64_t n = 0; n < BLOCK; n += 16) each(i, n, load16(s.sums + (i - from) * BLOCK + n));
#else
  for (int64_t i = from; i < to; i += 8) tile(K, a, s.panel, i, each);
#endif
}

// Copy what lies below the diagonal in the columns of a block to above it.
void mirror(int64_t R, int64_t first, bf16* a) {
  const int64_t next = first + BLOCK;
  if (next < R) transpose(a + next * R + first, R, R - next, BLOCK, a + first * R + next, R);
}

// A = X X^T.
void make_gram(int64_t R, int64_t C, Scratch& s) {
  for (int64_t first = 0; first < R; first += BLOCK) {
    bf16* gram = s.gram + first;
    pack_transposed(s.x + first * C, C, C, BLOCK, s.panel);
    product_rows(first, R, C, s.x, s, [=](int64_t i, int64_t n, __m512 sum) {
      store16(gram + i * R + n, sum);
    });
    mirror(R, first, s.gram);
  }
}

// P = bA + cA^2.
void make_map(int64_t R, double b, double c, Scratch& s) {
  const __m512 bs = _mm512_set1_ps(b), cs = _mm512_set1_ps(c);
  for (int64_t first = 0; first < R; first += BLOCK) {
    bf16 *gram = s.gram + first, *map = s.map + first;
    pack(gram, R, R, BLOCK, s.panel);
    product_rows(first, R, R, s.gram, s, [=](int64_t i, int64_t n, __m512 sum) {
      const __m512 linear = _mm512_mul_ps(bs, load16(gram + i * R + n));
      store16(map + i * R + n, _mm512_fmadd_ps(cs, sum, linear));
    });
    mirror(R, first, s.map);
  }
}

// X <- aX + PX.
void apply_map(int64_t R, int64_t C, double a, Scratch& s) {
  const __m512 as = _mm512_set1_ps(a);
  for (int64_t first = 0; first < C; first += BLOCK) {
    bf16* x = s.x + first;
    pack(x, C, R, BLOCK, s.panel);
    product_rows(0, R, R, s.map, s, [=](int64_t i, int64_t n, __m512 sum) {
      store16(x + i * C + n, _mm512_fmadd_ps(as, load16(x + i * C + n), sum));
    });
  }
}

void multiply(bf16* x, int64_t count, double by) {
  const __m512 factor = _mm512_set1_ps(by);
  for (int64_t n = 0; n < count; n += 16) store16(x + n, _mm512_mul_ps(factor, load16(x + n)));
}

double bound(int64_t R, const Iteration& iteration, const bf16* gram) {
  double total = 0;
  for (int64_t i = 0; i < R; ++i) {
    if (iteration.trace) {
      total += static_cast<float>(gram[i * R + i]);
      continue;
    }
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int64_t n = 0; n < R; n += 16) {
      const __m512 x = load16(gram + i * R + n);
      const __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
      const __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
      low = _mm512_fmadd_pd(first, first, low);
      high = _mm512_fmadd_pd(second, second, high);
    }
    total += _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  const double norm = std::sqrt(total);
  const double size = iteration.trace ? norm : iteration.margin * std::sqrt(norm);
  return size < iteration.eps ? iteration.eps : size;
}

// Dividing X by its bound rounds nothing: a power of two at once, the rest in the first polynomial.
void iterate(int64_t R, int64_t C, const Iteration& iteration, Scratch& s) {
  for (int64_t k = 0; k < iteration.count; ++k) {
    const double* abc = iteration.polynomials + 3 * k;
    double rest = 1;
    make_gram(R, C, s);
    if (k == 0) {
      const double size = bound(R, iteration, s.gram);
      const double power = std::exp2(-std::floor(std::log2(size)));
      multiply(s.x, R * C, power);
      multiply(s.gram, R * R, power * power);
      rest = 1 / (size * power);
    }
    make_map(R, abc[1] * std::pow(rest, 3), abc[2] * std::pow(rest, 5), s);
    apply_map(R, C, abc[0] * rest, s);
  }
}

// From `packed`, where a matrix lies as it is, to X and back.
void orthogonalise(int64_t rows, int64_t cols, const Iteration& iteration, Scratch& s) {
  const bool tall = rows > cols;
  if (tall) transpose(s.packed.data, cols, rows, cols, s.x, rows);
  else std::swap(s.packed.data, s.x.data);
  iterate(std::min(rows, cols), std::max(rows, cols), iteration, s);
  if (tall) transpose(s.x.data, rows, cols, rows, s.packed, cols);
  else std::swap(s.packed.data, s.x.data);
}

// A weight matrix with its gradient and momentum, all [rows, cols].
struct Matrix {
  float* weight;
  const float* grad;
  float* momentum;
  int64_t rows, cols;
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
  parallel(threads, M, [&] { return Scratch(R * C, R, C); }, [&](int64_t task, Scratch& s) {
    bf16* own = stack + task * rows * cols;
    std::memcpy(s.packed, own, R * C * sizeof(bf16));
    orthogonalise(rows, cols, iteration, s);
    std::memcpy(own, s.packed, R * C * sizeof(bf16));
  });
}

// Muon's whole step: move the momentum, w <- keep * w - rate * orthogonal(direction). Any shapes.
extern "C" void muon(const Matrix* matrices, const double* rates, int64_t M, double keep,
                     double momentum, int64_t nesterov, const double* polynomials, int64_t count,
                     int64_t trace, double margin, double eps, int64_t threads) {
  const Iteration iteration{polynomials, count, trace != 0, margin, eps};
  int64_t most = 0, R = 0, C = 0;
  for (int64_t m = 0; m < M; ++m) {
    most = std::max(most, matrices[m].rows * matrices[m].cols);
    R = std::max(R, std::min(matrices[m].rows, matrices[m].cols));
    C = std::max(C, std::max(matrices[m].rows, matrices[m].cols));
  }
  parallel(threads, M, [&] { return Scratch(most, R, C); }, [&](int64_t task, Scratch& s) {
    const Matrix& own = matrices[task];
    const int64_t size = own.rows * own.cols;
    for (int64_t n = 0; n < size; n += 16) {
      const __m512 grad = load16(own.grad + n);
      const __m512 moved = lerp16(load16(own.momentum + n), grad, 1 - momentum);
      store16(own.momentum + n, moved);
      store16(s.packed + n, nesterov != 0 ? lerp16(grad, moved, momentum) : moved);
    }
    orthogonalise(own.rows, own.cols, iteration, s);
    const __m512 keeps = _mm512_set1_ps(keep), rate = _mm512_set1_ps(rates[task]);
    for (int64_t n = 0; n < size; n += 16) {
      const __m512 kept = _mm512_mul_ps(keeps, load16(own.weight + n));
      store16(own.weight + n, _mm512_fnmadd_ps(rate, load16(s.packed + n), kept));
    }
  });
}
