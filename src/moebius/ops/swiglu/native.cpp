// SwiGLU of N rows that hold gate then up, 2F wide, and its gradient. F is a multiple of 16.
#include "kernels.h"

using namespace moebius;

extern "C" void swiglu(const bf16* gate_up, bf16* hidden, int64_t N, int64_t F, int64_t threads) {
  each_row(threads, N, [&](int64_t n) {
    const bf16 *gate = gate_up + n * 2 * F, *up = gate + F;
    for (int64_t f = 0; f < F; f += 16) {
      const __m512 g = load16(gate + f);
      store16(hidden + n * F + f, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid16(g)), load16(up + f)));
    }
  });
}

extern "C" void swiglu_backward(const bf16* grad, const bf16* gate_up, bf16* grad_gate_up, int64_t N,
                                int64_t F, int64_t threads) {
  const __m512 one = _mm512_set1_ps(1.0f);
  each_row(threads, N, [&](int64_t n) {
    const bf16 *gate = gate_up + n * 2 * F, *up = gate + F;
    bf16* grad_gate = grad_gate_up + n * 2 * F;
    for (int64_t f = 0; f < F; f += 16) {
      const __m512 g = load16(gate + f), s = sigmoid16(g), dh = load16(grad + n * F + f);
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
      store16(grad_gate + f, _mm512_mul_ps(_mm512_mul_ps(dh, load16(up + f)), slope));
      store16(grad_gate + F + f, _mm512_mul_ps(dh, _mm512_mul_ps(g, s)));
    }
  });
}
