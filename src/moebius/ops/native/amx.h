// Products on AMX tiles, written out: of operands so small that a call of brgemm costs as much as
// they do, and with other work in between.
#pragma once
#include "kernels.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moebius {

// This thread's tiles while it lives; no brgemm meanwhile, which shapes them for itself. `allowed`
// is false where there are none.
class Tiles {
 public:
  static constexpr int64_t SIDE = 32;  // of the sums of one product

#ifdef __AMX_BF16__
  Tiles() {
    if (!allowed) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    static_assert(sizeof shapes == 64);
    _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    if (allowed) _tile_release();
  }

  // C[32,32] = A[32,K] B[K,32], K a multiple of 32. A lies in blocks of 32 x 32, each contiguous; B
  // is a packed panel. meanwhile(k), after every 32 of K, must not read C or write A or B.
  template <typename Meanwhile>
  void product(int64_t K, const bf16* a, const bf16* b, float* c, Meanwhile meanwhile) const {
    if (K > 128) multiply<true>(K, a, b, c, meanwhile);
    else multiply<false>(K, a, b, c, meanwhile);
  }

 private:
  // STREAM: read A past the first cache, which the panel of a large K needs for itself.
  template <bool STREAM, typename Meanwhile>
  void multiply(int64_t K, const bf16* a, const bf16* b, float* c, Meanwhile meanwhile) const {
    constexpr int64_t row = SIDE * sizeof(bf16), pairs = 2 * row, sums = SIDE * sizeof(float);
    asm volatile("" ::: "memory");  // the compiler does not know what tiles read
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < K; k += 32) {
      const bf16 *left = a + k * SIDE, *right = b + k * SIDE;
      if (STREAM) _tile_stream_loadd(4, left, row);
      else _tile_loadd(4, left, row);
      _tile_loadd(6, right, pairs);
      _tile_loadd(7, right + 32, pairs);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (STREAM) _tile_stream_loadd(5, left + 16 * SIDE, row);
      else _tile_loadd(5, left + 16 * SIDE, row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      meanwhile(k);
    }
    _tile_stored(0, c, sums);
    _tile_stored(1, c + 16, sums);
    _tile_stored(2, c + 16 * SIDE, sums);
    _tile_stored(3, c + 16 * SIDE + 16, sums);
    asm volatile("" ::: "memory");
  }

  // A process has to ask Linux for them, once.
  static bool ask() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  }

 public:
  inline static const bool allowed = ask();
#else
  static constexpr bool allowed = false;
  template <typename Meanwhile>
  void product(int64_t, const bf16*, const bf16*, float*, Meanwhile) const {}
#endif
};

}  // namespace moebius
