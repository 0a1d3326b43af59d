// RMSNorm of rows and its gradients. N rows of width D, `stride` apart in x; everything else is dense.
#include "kernels.h"

using namespace moebius;

namespace {

// Rows whose gradients of the weight are summed by one task; the tasks' sums are added in order.
constexpr int64_t ROWS = 64;

template <typename Each>
inline void in_sixteens(int64_t D, Each each) {
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) each(d, [](const auto* p) { return load16(p); }, 16);
  if (d < D) each(d, [n = D - d](const auto* p) { return load_some(p, n); }, D - d);
}

inline void put(bf16* p, __m512 x, int64_t n) { n == 16 ? store16(p, x) : store_some(p, x, n); }
inline void put(float* p, __m512 x, int64_t n) { n == 16 ? store16(p, x) : store_some(p, x, n); }

struct None {};

}  // namespace

extern "C" void rms_norm(const bf16* x, int64_t stride, const float* w, bf16* y, float* inverse,
                         int64_t N, int64_t D, double eps, int64_t threads) {
  each_row(threads, N, [&](int64_t n) {
    const bf16* row = x + n * stride;
    __m512 square = _mm512_setzero_ps();
    in_sixteens(D, [&](int64_t d, auto load, int64_t) {
      const __m512 v = load(row + d);
      square = _mm512_fmadd_ps(v, v, square);
    });
    inverse[n] = 1.0f / std::sqrt(_mm512_reduce_add_ps(square) / D + static_cast<float>(eps));
    const __m512 scale = _mm512_set1_ps(inverse[n]);
    in_sixteens(D, [&](int64_t d, auto load, int64_t some) {
      put(y + n * D + d, _mm512_mul_ps(_mm512_mul_ps(load(row + d), scale), load(w + d)), some);
    });
  });
}

extern "C" void rms_norm_backward(const bf16* grad, const bf16* x, int64_t stride, const float* w,
                                  const float* inverse, bf16* grad_x, float* grad_w, int64_t N,
                                  int64_t D, int64_t threads) {
  const int64_t tasks = (N + ROWS - 1) / ROWS;
  Buffer<float> partial(tasks * D);
  parallel(threads, tasks, [] { return None(); }, [&](int64_t task, None&) {
    float* own = partial + task * D;
    std::memset(own, 0, D * sizeof(float));
    for (int64_t n = task * ROWS; n < std::min(N, (task + 1) * ROWS); ++n) {
      const bf16 *row = x + n * stride, *dy = grad + n * D;
      __m512 dot = _mm512_setzero_ps();
      const __m512 scale = _mm512_set1_ps(inverse[n]);
      in_sixteens(D, [&](int64_t d, auto load, int64_t some) {
        const __m512 seen = _mm512_mul_ps(load(dy + d), _mm512_mul_ps(load(row + d), scale));
        dot = _mm512_fmadd_ps(seen, load(w + d), dot);
        put(own + d, _mm512_add_ps(load(own + d), seen), some);
      });
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / D);
      in_sixteens(D, [&](int64_t d, auto load, int64_t some) {
        const __m512 unit = _mm512_mul_ps(load(row + d), scale);
        const __m512 wide = _mm512_mul_ps(load(dy + d), load(w + d));
        put(grad_x + n * D + d, _mm512_mul_ps(scale, _mm512_fnmadd_ps(unit, mean, wide)), some);
      });
    }
  });
  std::memset(grad_w, 0, D * sizeof(float));
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t d = 0; d < D; ++d) grad_w[d] += partial[task * D + d];
}
