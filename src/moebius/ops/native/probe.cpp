// The smallest kernel: a packed product, and a transpose. It tells whether kernels work here, and lets a
// test compare the layouts with torch.
#include "kernels.h"

using namespace moebius;

extern "C" void probe_product(const bf16* a, const float* b, const bf16* b_transposed, float* c,
                              float* c_too, int64_t M, int64_t N, int64_t K) {
  Buffer<bf16> packed(K * N);
  pack(b, N, K, N, packed);
  product(M, N, K, a, K, packed, c, N, false);
  pack_transposed(b_transposed, K, K, N, packed);
  product(M, N, K, a, K, packed, c_too, N, false);
  product(M, N, K, a, K, packed, c_too, N, true);
  at::native::cpublas::brgemm_release();
}

extern "C" void probe_transpose(const float* x, bf16* out, int64_t K, int64_t N) {
  transpose(x, N, K, N, out, K);
}

extern "C" void probe_exp(const float* x, float* y, float* sigmoid, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = std::min<int64_t>(16, count - i);
    const __m512 some = n == 16 ? load16(x + i) : load_some(x + i, n);
    if (n == 16) {
      store16(y + i, exp16(some));
      store16(sigmoid + i, sigmoid16(some));
    } else {
      store_some(y + i, exp16(some), n);
      store_some(sigmoid + i, sigmoid16(some), n);
    }
  }
}
