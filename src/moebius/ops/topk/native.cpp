// The k largest of each of N rows of E values, by k passes over those not yet taken.
#include <limits>

#include "kernels.h"

using namespace moebius;

namespace {

struct Row {
  explicit Row(int64_t E) : values(round_up(E, 16)), left(round_up(E, 16) / 16) {}
  Buffer<float> values;
  Buffer<__mmask16> left;  // what is not taken, 16 values a word
};

// A NaN counts as infinite, so that it is taken first.
void load(const float* x, int64_t E, Row& row) {
  const __m512 infinite = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  for (int64_t e = 0; e < E; e += 16) {
    const int64_t some = std::min<int64_t>(16, E - e);
    const __m512 values = some == 16 ? load16(x + e) : load_some(x + e, some);
    const __mmask16 lost = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    store16(row.values + e, _mm512_mask_mov_ps(values, lost, infinite));
    row.left[e / 16] = static_cast<__mmask16>((1u << some) - 1);
  }
}

// The largest value that is left, the first of equal ones; it is left no more.
int64_t take(int64_t E, Row& row) {
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 top = least;
  for (int64_t e = 0; e < E; e += 16)
    top = _mm512_mask_max_ps(top, row.left[e / 16], top, load16(row.values + e));
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  for (int64_t e = 0;; e += 16) {
    __mmask16& left = row.left[e / 16];
    const __mmask16 found =
        _mm512_mask_cmp_ps_mask(left, load16(row.values + e), largest, _CMP_EQ_OQ);
    if (found == 0) continue;
    const int lane = __builtin_ctz(found);
    left &= static_cast<__mmask16>(~(1u << lane));
    return e + lane;
  }
}

}  // namespace

extern "C" void topk(const float* x, int64_t* index, int64_t N, int64_t E, int64_t k,
                     int64_t threads) {
  constexpr int64_t SOME = 64;
  parallel(threads, (N + SOME - 1) / SOME, [&] { return Row(E); }, [&](int64_t task, Row& row) {
    for (int64_t n = task * SOME; n < std::min(N, (task + 1) * SOME); ++n) {
      load(x + n * E, E, row);
      for (int64_t i = 0; i < k; ++i) index[n * k + i] = take(E, row);
    }
  });
}
