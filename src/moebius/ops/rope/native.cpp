// Rotary positions: pairs (2i, 2i+1) of the last R of K dims are turned, the first K - R are copied.
// N tokens, `token_stride` apart, of H heads, `head_stride` apart; cosines and sines are [N, R / 2].
// K and R are even; `sign` -1 turns back.
#include "kernels.h"

using namespace moebius;

namespace {
// 8 values, each twice.
inline __m512 twice(const float* p, int64_t n) {
  const __m256 x = _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << n) - 1), p);
  const __m512i order = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(x));
}
}  // namespace

extern "C" void rope(const bf16* x, int64_t token_stride, int64_t head_stride, const float* cosine,
                     const float* sine, bf16* y, int64_t N, int64_t H, int64_t K, int64_t R,
                     double sign, int64_t threads) {
  const __m512 turn = _mm512_mask_blend_ps(0xaaaa, _mm512_set1_ps(-sign), _mm512_set1_ps(sign));
  each_row(threads, N, [&](int64_t n) {
    for (int64_t h = 0; h < H; ++h) {
      const bf16* from = x + n * token_stride + h * head_stride;
      bf16* to = y + (n * H + h) * K;
      std::memcpy(to, from, (K - R) * sizeof(bf16));
      from += K - R, to += K - R;
      for (int64_t r = 0; r < R; r += 16) {
        const int64_t some = std::min<int64_t>(16, R - r);
        const float *c = cosine + n * (R / 2) + r / 2, *s = sine + n * (R / 2) + r / 2;
        const __m512 v = some == 16 ? load16(from + r) : load_some(from + r, some);
        const __m512 crossed = _mm512_mul_ps(_mm512_permute_ps(v, 0xb1), twice(s, some / 2));
        const __m512 sum = _mm512_fmadd_ps(v, twice(c, some / 2), _mm512_mul_ps(crossed, turn));
        some == 16 ? store16(to + r, sum) : store_some(to + r, sum, some);
      }
    }
  });
}
