// Rounding to a low-precision format: the largest magnitude of each block, and, once its scale is
// known, its elements on their grid. Blocks lie along the rows of x[M,R,C], or across them.
#include "kernels.h"

using namespace moebius;

namespace {

struct Shape {
  int64_t M, R, C, block;
  bool across;  // blocks of `block` rows of a column, not of columns of a row
  // At least one, of zeros, where there is nothing.
  int64_t blocks() const { return std::max<int64_t>(1, ((across ? R : C) + block - 1) / block); }
};

// To bf16 by whole numbers: the instruction for it would make zeros of the smallest numbers.
inline void put(bf16* to, __m512 value, int64_t n) {
  const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << n) - 1), half);
}
inline void put(float* to, __m512 value, int64_t n) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), value);
}

// Up to 16 values; what is not there reads as 0.
template <typename T>
inline __m512 get(const T* from, int64_t n) {
  if (n <= 0) return _mm512_setzero_ps();
  return n >= 16 ? load16(from) : load_some(from, n);
}

// As torch has it: a NaN is larger than all else. The bits of magnitudes rise with them, NaNs last.
template <typename T>
inline __m512i magnitude(const T* x, int64_t n) {
  return _mm512_and_si512(_mm512_castps_si512(get(x, n)), _mm512_set1_epi32(0x7fffffff));
}

// Work on blocks that lie across rows: 64 columns of one block a task, 16 of them a call.
template <typename Each>
void each_across(const Shape& s, int64_t threads, Each each) {
  struct None {};
  const int64_t groups = (s.C + 63) / 64, blocks = s.blocks();
  parallel(threads, s.M * blocks * groups, [] { return None(); }, [&](int64_t task, None&) {
    const int64_t m = task / groups / blocks, b = task / groups % blocks, first = task % groups * 64;
    for (int64_t c = first; c < std::min(s.C, first + 64); c += 16)
      each(m, b, c, std::min<int64_t>(16, s.C - c));
  });
}

template <typename T>
void largest(const T* x, float* out, const Shape& s, int64_t threads) {
  const int64_t blocks = s.blocks();
  if (s.across) {
    each_across(s, threads, [&](int64_t m, int64_t b, int64_t c, int64_t n) {
      __m512i most = _mm512_setzero_si512();
      for (int64_t r = b * s.block; r < std::min(s.R, (b + 1) * s.block); ++r)
        most = _mm512_max_epi32(most, magnitude(x + (m * s.R + r) * s.C + c, n));
      put(out + (m * blocks + b) * s.C + c, _mm512_castsi512_ps(most), n);
    });
    return;
  }
  each_row(threads, s.M * s.R, [&](int64_t row) {
    for (int64_t b = 0; b < blocks; ++b) {
      __m512i most = _mm512_setzero_si512();
      const int64_t end = std::min(s.C, (b + 1) * s.block);
      for (int64_t c = b * s.block; c < end; c += 16)
        most = _mm512_max_epi32(most, magnitude(x + row * s.C + c, end - c));
      const int value = _mm512_reduce_max_epi32(most);
      std::memcpy(out + row * blocks + b, &value, 4);
    }
  });
}

// The values of an element: its largest, 2^(least exponent), and 1.5 * 2^(23 - mantissa).
struct Grid {
  float maximum, least, magic;
};

// x / total on the grid, ties to even, times the scale. A NaN passes: it is the second operand.
inline __m512 round16(__m512 x, __m512 total, __m512 scale, const Grid& grid) {
  const __m512i sign = _mm512_set1_epi32(0x80000000), exponent = _mm512_set1_epi32(0x7f800000);
  x = _mm512_div_ps(x, total);
  x = _mm512_max_ps(_mm512_set1_ps(-grid.maximum), x);
  x = _mm512_min_ps(_mm512_set1_ps(grid.maximum), x);
  const __m512i bits = _mm512_castps_si512(x);
  __m512 magic = _mm512_castsi512_ps(_mm512_and_si512(bits, exponent));
  magic = _mm512_mul_ps(_mm512_max_ps(magic, _mm512_set1_ps(grid.least)), _mm512_set1_ps(grid.magic));
  const __m512 rounded = _mm512_sub_ps(_mm512_add_ps(x, magic), magic);
  // The bits of the sign are x's own, so that zeros keep theirs.
  const __m512i value = _mm512_ternarylogic_epi32(sign, bits, _mm512_castps_si512(rounded), 0xca);
  return _mm512_mul_ps(_mm512_castsi512_ps(value), scale);
}

// A scale that is 0 makes zeros of its block.
inline __m512 divisor(__m512 total) {
  const __mmask16 zero = _mm512_cmp_ps_mask(total, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_mask_blend_ps(zero, total, _mm512_set1_ps(INFINITY));
}

// y has whole blocks: what lies beyond x counts as 0. scale is null where it stays outside.
template <typename T, typename U>
void to_grid(const T* x, const float* total, const float* scale, U* y, const Shape& s,
             const Grid& grid, int64_t threads) {
  const int64_t blocks = s.blocks(), length = blocks * s.block;
  const __m512 one = _mm512_set1_ps(1.0f);
  if (s.across) {
    each_across(s, threads, [&](int64_t m, int64_t b, int64_t c, int64_t n) {
      const int64_t at = (m * blocks + b) * s.C + c;
      const __m512 by = divisor(get(total + at, n));
      const __m512 times = scale == nullptr ? one : get(scale + at, n);
      for (int64_t r = b * s.block; r < (b + 1) * s.block; ++r) {
        const __m512 value = get(x + (m * s.R + r) * s.C + c, r < s.R ? n : 0);
        put(y + (m * length + r) * s.C + c, round16(value, by, times, grid), n);
      }
    });
    return;
  }
  each_row(threads, s.M * s.R, [&](int64_t row) {
    for (int64_t b = 0; b < blocks; ++b) {
      const __m512 by = divisor(_mm512_set1_ps(total[row * blocks + b]));
      const __m512 times = scale == nullptr ? one : _mm512_set1_ps(scale[row * blocks + b]);
      const int64_t end = (b + 1) * s.block;
      for (int64_t c = b * s.block; c < end; c += 16) {
        const __m512 value = get(x + row * s.C + c, std::min(s.C, end) - c);
        put(y + row * length + c, round16(value, by, times, grid), std::min<int64_t>(16, end - c));
      }
    }
  });
}

}  // namespace

extern "C" void largest_of(const void* x, int64_t half, float* out, int64_t M, int64_t R, int64_t C,
                           int64_t block, int64_t across, int64_t threads) {
  const Shape s{M, R, C, block, across != 0};
  if (half != 0) largest(static_cast<const bf16*>(x), out, s, threads);
  else largest(static_cast<const float*>(x), out, s, threads);
}

extern "C" void round_to_grid(const void* x, int64_t half, const float* total, const float* scale,
                              void* y, int64_t half_out, int64_t M, int64_t R, int64_t C,
                              int64_t block, int64_t across, double maximum, double least,
                              double magic, int64_t threads) {
  const Shape s{M, R, C, block, across != 0};
  const Grid grid{static_cast<float>(maximum), static_cast<float>(least), static_cast<float>(magic)};
  auto from = [&](auto* in) {
    if (half_out != 0) to_grid(in, total, scale, static_cast<bf16*>(y), s, grid, threads);
    else to_grid(in, total, scale, static_cast<float*>(y), s, grid, threads);
  };
  if (half != 0) from(static_cast<const bf16*>(x));
  else from(static_cast<const float*>(x));
}

// x[R,C] times what its row and its column are to be multiplied by, one after the other, in place.
// A step of 0 is one number for all.
extern "C" void scale_product(bf16* x, const float* row, int64_t row_step, const float* column,
                              int64_t column_step, int64_t R, int64_t C, int64_t threads) {
  each_row(threads, R, [&](int64_t r) {
    const __m512 left = _mm512_set1_ps(row[r * row_step]), all = _mm512_set1_ps(column[0]);
    for (int64_t c = 0; c < C; c += 16) {
      bf16* at = x + r * C + c;
      const __m512 right = column_step == 0 ? all : get(column + c, C - c);
      const __m512 value = _mm512_mul_ps(_mm512_mul_ps(get(at, C - c), left), right);
      put(at, value, std::min<int64_t>(16, C - c));
    }
  });
}
