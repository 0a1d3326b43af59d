// What the CPU kernels share: tiles of bf16 products with fp32 sums, and the layouts they want.
//
// Products are torch's own `brgemm` (oneDNN micro-kernels: AMX tiles or AVX512-BF16), single-threaded
// and without any cost to set up once a shape has been seen; so keep shapes few. A product is
// C[M,N] (+)= A[M,K] B[K,N], A row-major bf16, C row-major fp32, B packed: panels of 64 columns (the
// last one narrower), each [K/2][columns][2]. K is even, N a multiple of 16.
#pragma once
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace moebius {

using bf16 = at::BFloat16;
constexpr int64_t PANEL = 64;

// A buffer aligned to cache lines, not initialised; one a thread, made inside the parallel region.
template <typename T>
struct Buffer {
  explicit Buffer(int64_t count)
      : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data; }
  T* data;
};

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// 16 values.
inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store16(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
inline void store16(bf16* p, __m512 x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &rounded, 32);
}

// The first n < 16 values; the others read as 0 and are left as they are.
inline __m512 load_some(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
inline __m512 load_some(const bf16* p, int64_t n) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store_some(float* p, __m512 x, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x);
}
inline void store_some(bf16* p, __m512 x, int64_t n) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  __m256i bits;
  std::memcpy(&bits, &rounded, 32);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), bits);
}

// exp(x), relative error about 2e-7; 0 below -87, finite above 88.
inline __m512 exp16(__m512 x) {
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_mask_blend_ps(tiny, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
}

inline __m512 sigmoid16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Two rows of 16 values, as bf16, interleaved: (a0, b0, a1, b1, ...).
template <typename T>
inline __m512i interleave16(const T* a, const T* b) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(load16(a)), 16);
  const __m512i high = _mm512_castps_si512(load16(b));
  return _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi32(0xffff0000)));
}
template <>
inline __m512i interleave16(const float* a, const float* b) {
  const __m256bh low = _mm512_cvtneps_pbh(load16(a)), high = _mm512_cvtneps_pbh(load16(b));
  __m256i lows, highs;
  std::memcpy(&lows, &low, 32);
  std::memcpy(&highs, &high, 32);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(lows),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(highs), 16));
}

// 16 x 16 words of 32 bits.
inline void transpose_words(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// 16 rows of 32 values, as pairs: words[i] holds row i.
template <typename T>
inline void load_pairs(const T* x, int64_t stride, __m512i words[16]) {
  for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(x + i * stride);
}
template <>
inline void load_pairs(const float* x, int64_t stride, __m512i words[16]) {
  for (int i = 0; i < 16; ++i) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(load16(x + i * stride + 16), load16(x + i * stride));
    std::memcpy(&words[i], &pairs, 64);
  }
}

// Pack B[K,N], row-major (T: bf16 or float). K even, N a multiple of 16.
template <typename T>
inline void pack(const T* b, int64_t stride, int64_t K, int64_t N, bf16* out) {
  for (int64_t first = 0; first < N; first += PANEL) {
    const int64_t width = std::min(PANEL, N - first);
    bf16* panel = out + first * K;
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t n = 0; n < width; n += 16) {
        const T* from = b + k * stride + first + n;
        _mm512_storeu_si512(panel + k * width + 2 * n, interleave16(from, from + stride));
      }
  }
}

// Pack B[K,N] given as its transpose [N,K], row-major. K a multiple of 32, N of 16.
template <typename T>
inline void pack_transposed(const T* bt, int64_t stride, int64_t K, int64_t N, bf16* out) {
  __m512i words[16];
  for (int64_t first = 0; first < N; first += PANEL) {
    const int64_t width = std::min(PANEL, N - first);
    bf16* panel = out + first * K;
    for (int64_t n = 0; n < width; n += 16)
      for (int64_t k = 0; k < K; k += 32) {
        load_pairs(bt + (first + n) * stride + k, stride, words);
        transpose_words(words);
        for (int i = 0; i < 16; ++i)
          _mm512_storeu_si512(panel + (k + 2 * i) * width + 2 * n, words[i]);
      }
  }
}

// out[N,K] = x[K,N] transposed, both row-major. K a multiple of 32, N of 16.
template <typename T>
inline void transpose(const T* x, int64_t stride, int64_t K, int64_t N, bf16* out, int64_t out_stride) {
  __m512i words[16];
  for (int64_t k = 0; k < K; k += 32)
    for (int64_t n = 0; n < N; n += 16) {
      for (int i = 0; i < 16; ++i) {
        const T* from = x + (k + 2 * i) * stride + n;
        words[i] = interleave16(from, from + stride);
      }
      transpose_words(words);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (n + i) * out_stride + k, words[i]);
    }
}

// C[M,N] = A[M,K] B[K,N], or += where `add`; B packed.
inline void product(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t a_stride, const bf16* b,
                    float* c, int64_t c_stride, bool add) {
  for (int64_t first = 0; first < N; first += PANEL) {
    const int64_t width = std::min(PANEL, N - first);
    at::native::cpublas::brgemm(M, width, K, a_stride, width, c_stride, add, a, b + first * K,
                                c + first, true);
  }
}

// Run `work(task)` for all tasks on `threads` threads, handing them out one by one. A thread's
// scratch is made by `scratch()`; what a task writes must be its own, so that the order is no matter.
template <typename Scratch, typename Work>
inline void parallel(int64_t threads, int64_t tasks, Scratch scratch, Work work) {
#pragma omp parallel num_threads(static_cast<int>(std::max<int64_t>(1, std::min(threads, tasks))))
  {
    auto own = scratch();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) work(task, own);
    at::native::cpublas::brgemm_release();
  }
}

// 2^x, relative error 3e-6 and exact for integers; 0 for -inf.
inline __m512 exp2_16(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0.01342679f);
  for (const float c : {0.0522423f, 0.24128029f, 0.69304483f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, x);
}

// (a0, b0, a1, b1, ...) from (a0, a1, ..., b0, b1, ...): two rows of 16, as `pack` lays them out.
inline __m512i interleave_halves(__m512bh rows) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i bits;
  std::memcpy(&bits, &rows, 64);
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), bits);
}

// The two rows each to its own place.
inline void store_halves(bf16* first, bf16* second, __m512bh rows) {
  std::memcpy(first, &rows, 32);
  std::memcpy(second, reinterpret_cast<const char*>(&rows) + 32, 32);
}

inline float dot(const bf16* a, const bf16* b, int64_t count) {
  __m512 total = _mm512_setzero_ps();
  int64_t n = 0;
  for (; n + 16 <= count; n += 16) total = _mm512_fmadd_ps(load16(a + n), load16(b + n), total);
  if (n < count)
    total = _mm512_fmadd_ps(load_some(a + n, count - n), load_some(b + n, count - n), total);
  return _mm512_reduce_add_ps(total);
}

// Ask for rows ahead of their use.
inline void fetch(const bf16* x, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < width; n += 32) _mm_prefetch(x + i * stride + n, _MM_HINT_T1);
}

// Copy rows into [out_rows, out_width], zeros around them. out_width a multiple of 32.
inline void copy_padded(const bf16* x, int64_t stride, int64_t rows, int64_t width,
                        int64_t out_rows, int64_t out_width, bf16* out) {
  for (int64_t i = 0; i < out_rows; ++i)
    for (int64_t n = 0; n < out_width; n += 32) {
      const int64_t inside = i < rows ? std::clamp<int64_t>(width - n, 0, 32) : 0;
      const __mmask32 lanes = inside == 32 ? ~0u : (1u << inside) - 1;
      _mm512_storeu_si512(out + i * out_width + n,
                          _mm512_maskz_loadu_epi16(lanes, x + i * stride + n));
    }
}

// Run `each(row)` for all rows, some at a time, where a row needs no scratch.
template <typename Each>
inline void each_row(int64_t threads, int64_t rows, Each each) {
  constexpr int64_t SOME = 32;
  struct None {};
  parallel(threads, (rows + SOME - 1) / SOME, [] { return None(); }, [&](int64_t task, None&) {
    for (int64_t n = task * SOME; n < std::min(rows, (task + 1) * SOME); ++n) each(n);
  });
}

}  // namespace moebius
