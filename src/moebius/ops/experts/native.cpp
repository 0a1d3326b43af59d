// The expert op on a CPU: SwiGLU experts over rows sorted by expert, forward and backward, each in one pass
// over the experts and one over the tokens. M rows: assignments to FFN experts, in the order of experts, those of
// an expert in the order of tokens. Rows pass in tiles that stay in cache; weights and their gradients are the
// masters themselves, packed and rounded to bf16 expert by expert.
//
// No sum depends on the number of threads: a piece of an expert's rows is one task, pieces depend on the loads
// alone, and what meets (pieces in a weight's gradient, experts in a token) is added in a fixed order.
#include <numeric>

#include "kernels.h"

using namespace moebius;

namespace {

constexpr int64_t TILE = 128;  // rows of a product
constexpr int64_t STEP = 32;   // rows are padded to its multiples: few shapes, and even sums over rows
constexpr int64_t PIECES = 16;

struct Sizes {
  int64_t N, S, D, F, E;
};

struct Piece {
  int64_t expert, first, rows;
  int64_t part;  // 0, or one more than the index of the buffer that takes its gradients
};

// Experts in pieces of at most 1/16 of all rows, the longest first.
std::vector<Piece> pieces_of(const Sizes& z, const int64_t* start_E) {
  const int64_t most = std::max(TILE, round_up(start_E[z.E] / PIECES + 1, TILE));
  std::vector<Piece> pieces;
  int64_t parts = 0;
  for (int64_t e = 0; e < z.E; ++e) {
    int64_t first = start_E[e];
    do {
      const int64_t rows = std::min(most, start_E[e + 1] - first);
      pieces.push_back({e, first, rows, first == start_E[e] ? 0 : ++parts});
      first += rows;
    } while (first < start_E[e + 1]);
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.rows > b.rows; });
  return pieces;
}

// Rows of x [., D] named by `order` (assignments n * S + s), zeros up to `padded`.
void gather(const Sizes& z, const bf16* x, const int64_t* order, int64_t rows, int64_t padded, bf16* out) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * z.D, x + order[i] / z.S * z.D, z.D * 2);
  std::memset(out + rows * z.D, 0, (padded - rows) * z.D * 2);
}

void round_rows(const float* from, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; i += 16) store16(to + i, load16(from + i));
}

// y_ND: the sum of each token's rows, in the order of its slots, times `weight` where there is one.
void sum_slots(const Sizes& z, const bf16* out_MD, const int64_t* row_NS, const float* weight, bf16* y,
               int64_t threads) {
  constexpr int64_t BLOCK = 64;
  auto none = [] { return 0; };
  parallel(threads, (z.N + BLOCK - 1) / BLOCK, none, [&](int64_t block, int) {
    const int64_t end = std::min(z.N, (block + 1) * BLOCK);
    for (int64_t n = block * BLOCK; n < end; ++n)
      for (int64_t d = 0; d < z.D; d += 32) {
        __m512 low = _mm512_setzero_ps(), high = low;
        for (int64_t slot = n * z.S; slot < (n + 1) * z.S; ++slot) {
          if (row_NS[slot] < 0) continue;
          const bf16* from = out_MD + row_NS[slot] * z.D + d;
          const __m512 w = _mm512_set1_ps(weight == nullptr ? 1.0f : weight[slot]);
          low = _mm512_fmadd_ps(w, load16(from), low);
          high = _mm512_fmadd_ps(w, load16(from + 16), high);
        }
        store16(y + n * z.D + d, low);
        store16(y + n * z.D + d + 16, high);
      }
  });
}

struct ForwardScratch {
  explicit ForwardScratch(const Sizes& z)
      : gate_up(2 * z.F * z.D), down(z.F * z.D), x(TILE * z.D), hidden(TILE * z.F), sums(TILE * std::max(2 * z.F, z.D)) {}
  Buffer<bf16> gate_up, down, x, hidden;
  Buffer<float> sums;
};

// hidden = silu(gate) * up; gate and up themselves are kept, where there is a place.
void activate(const Sizes& z, const float* gate_up, int64_t rows, bf16* hidden, bf16* kept) {
  for (int64_t i = 0; i < rows; ++i, gate_up += 2 * z.F, hidden += z.F) {
    for (int64_t f = 0; f < z.F; f += 16) {
      const __m512 gate = load16(gate_up + f), up = load16(gate_up + z.F + f);
      store16(hidden + f, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid16(gate)), up));
    }
    if (kept != nullptr) round_rows(gate_up, 2 * z.F, kept + i * 2 * z.F);
  }
}

template <typename W>
void forward(const Sizes& z, const bf16* x, const int64_t* order_M, const int64_t* row_NS, const int64_t* start_E,
             const float* weight, const W* w_gate_up, const W* w_down, bf16* gate_up_MX, bf16* out_MD, bf16* y,
             int64_t threads) {
  const auto pieces = pieces_of(z, start_E);
  auto scratch = [&] { return std::make_unique<ForwardScratch>(z); };
  parallel(threads, pieces.size(), scratch, [&](int64_t task, auto& own) {
    const Piece& piece = pieces[task];
    if (piece.rows == 0) return;
    pack_transposed(w_gate_up + piece.expert * 2 * z.F * z.D, z.D, z.D, 2 * z.F, own->gate_up);
    pack_transposed(w_down + piece.expert * z.D * z.F, z.F, z.F, z.D, own->down);
    for (int64_t done = 0; done < piece.rows; done += TILE) {
      const int64_t first = piece.first + done, rows = std::min(TILE, piece.rows - done);
      const int64_t padded = round_up(rows, STEP);
      gather(z, x, order_M + first, rows, padded, own->x);
      product(padded, 2 * z.F, z.D, own->x, z.D, own->gate_up, own->sums, 2 * z.F, false);
      bf16* kept = gate_up_MX == nullptr ? nullptr : gate_up_MX + first * 2 * z.F;
      activate(z, own->sums, rows, own->hidden, kept);
      std::memset(own->hidden + rows * z.F, 0, (padded - rows) * z.F * 2);
      product(padded, z.D, z.F, own->hidden, z.F, own->down, own->sums, z.D, false);
      round_rows(own->sums, rows * z.D, out_MD + first * z.D);
    }
  });
  sum_slots(z, out_MD, row_NS, weight, y, threads);
}

struct BackwardScratch {
  explicit BackwardScratch(const Sizes& z)
      : gate_up(2 * z.F * z.D), down(z.F * z.D), rows(TILE * z.D), hidden(TILE * z.F), grad_gate_up(TILE * 2 * z.F),
        packed(TILE * std::max(z.F, z.D)), turned(TILE * std::max(2 * z.F, z.D)), sums(TILE * std::max(z.F, z.D)) {}
  Buffer<bf16> gate_up, down, rows, hidden, grad_gate_up, packed, turned;
  Buffer<float> sums;
};

// From the gradients dh of `hidden` before its weight: those of gate and up, the weighted hidden, and of the weights.
void activate_backward(const Sizes& z, const bf16* gate_up, const float* dh, const int64_t* order, int64_t rows,
                       const float* weight, bf16* grad_gate_up, bf16* hidden, float* grad_weight) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < rows; ++i, gate_up += 2 * z.F, grad_gate_up += 2 * z.F, dh += z.F, hidden += z.F) {
    const __m512 w = _mm512_set1_ps(weight[order[i]]);
    __m512 dot = _mm512_setzero_ps();
    for (int64_t f = 0; f < z.F; f += 16) {
      const __m512 gate = load16(gate_up + f), up = load16(gate_up + z.F + f), grad = load16(dh + f);
      const __m512 sigmoid = sigmoid16(gate), silu = _mm512_mul_ps(gate, sigmoid);
      const __m512 value = _mm512_mul_ps(silu, up), weighted = _mm512_mul_ps(w, grad);
      const __m512 slope = _mm512_mul_ps(sigmoid, _mm512_fmadd_ps(gate, _mm512_sub_ps(one, sigmoid), one));
      dot = _mm512_fmadd_ps(value, grad, dot);
      store16(hidden + f, _mm512_mul_ps(w, value));
      store16(grad_gate_up + f, _mm512_mul_ps(_mm512_mul_ps(weighted, up), slope));
      store16(grad_gate_up + z.F + f, _mm512_mul_ps(weighted, silu));
    }
    grad_weight[order[i]] = _mm512_reduce_add_ps(dot);
  }
}

// grad_w_down [D,F] += dy^T hidden, grad_w_gate_up [2F,D] += grad_gate_up^T x, over `padded` rows; the first set them.
void weight_gradients(const Sizes& z, BackwardScratch& own, int64_t padded, bool add, float* gate_up, float* down) {
  if (down != nullptr) {
    transpose(own.rows.data, z.D, padded, z.D, own.turned, padded);
    pack(own.hidden.data, z.F, padded, z.F, own.packed);
    product(z.D, z.F, padded, own.turned, padded, own.packed, down, z.F, add);
  }
  if (gate_up != nullptr) {
    transpose(own.grad_gate_up.data, 2 * z.F, padded, 2 * z.F, own.turned, padded);
    product(2 * z.F, z.D, padded, own.turned, padded, own.packed, gate_up, z.D, add);
  }
}

struct Gradients {
  bf16* x;
  float *weight, *gate_up, *down;
};

template <typename W>
void backward(const Sizes& z, const bf16* dy, const bf16* x, const int64_t* order_M, const int64_t* row_NS,
              const int64_t* start_E, const float* weight, const W* w_gate_up, const W* w_down,
              const bf16* gate_up_MX, bf16* grad_x_MD, const Gradients& grads, int64_t threads) {
  const auto pieces = pieces_of(z, start_E);
  const int64_t size_up = 2 * z.F * z.D, size_down = z.D * z.F;
  const int64_t parts = pieces.size() - z.E;
  Buffer<float> more_up(grads.gate_up == nullptr ? 0 : parts * size_up);
  Buffer<float> more_down(grads.down == nullptr ? 0 : parts * size_down);
  auto place = [](const Piece& piece, float* whole, float* more, int64_t size) -> float* {
    if (whole == nullptr) return nullptr;
    return piece.part == 0 ? whole + piece.expert * size : more + (piece.part - 1) * size;
  };
  auto scratch = [&] { return std::make_unique<BackwardScratch>(z); };
  parallel(threads, pieces.size(), scratch, [&](int64_t task, auto& own) {
    const Piece& piece = pieces[task];
    float* grad_up = place(piece, grads.gate_up, more_up, size_up);
    float* grad_down = place(piece, grads.down, more_down, size_down);
    if (piece.rows == 0) {
      if (grad_up != nullptr) std::fill_n(grad_up, size_up, 0.0f);
      if (grad_down != nullptr) std::fill_n(grad_down, size_down, 0.0f);
      return;
    }
    pack(w_down + piece.expert * size_down, z.F, z.D, z.F, own->down);
    if (grads.x != nullptr) pack(w_gate_up + piece.expert * size_up, z.D, 2 * z.F, z.D, own->gate_up);
    for (int64_t done = 0; done < piece.rows; done += TILE) {
      const int64_t first = piece.first + done, rows = std::min(TILE, piece.rows - done);
      const int64_t padded = round_up(rows, STEP);
      gather(z, dy, order_M + first, rows, padded, own->rows);
      product(padded, z.F, z.D, own->rows, z.D, own->down, own->sums, z.F, false);
      activate_backward(z, gate_up_MX + first * 2 * z.F, own->sums, order_M + first, rows, weight, own->grad_gate_up,
                        own->hidden, grads.weight);
      std::memset(own->hidden + rows * z.F, 0, (padded - rows) * z.F * 2);
      std::memset(own->grad_gate_up + rows * 2 * z.F, 0, (padded - rows) * 2 * z.F * 2);
      weight_gradients(z, *own, padded, done > 0, nullptr, grad_down);
      if (grad_up != nullptr) {
        gather(z, x, order_M + first, rows, padded, own->rows);
        pack(own->rows.data, z.D, padded, z.D, own->packed);
        weight_gradients(z, *own, padded, done > 0, grad_up, nullptr);
      }
      if (grads.x == nullptr) continue;
      product(padded, z.D, 2 * z.F, own->grad_gate_up, 2 * z.F, own->gate_up, own->sums, z.D, false);
      round_rows(own->sums, rows * z.D, grad_x_MD + first * z.D);
    }
  });
  std::vector<Piece> further(parts);
  for (const Piece& piece : pieces)
    if (piece.part > 0) further[piece.part - 1] = piece;
  for (const Piece& piece : further) {
    float* up = grads.gate_up == nullptr ? nullptr : grads.gate_up + piece.expert * size_up;
    float* down = grads.down == nullptr ? nullptr : grads.down + piece.expert * size_down;
    const float *up_too = more_up + (piece.part - 1) * size_up, *down_too = more_down + (piece.part - 1) * size_down;
    for (int64_t i = 0; up != nullptr && i < size_up; ++i) up[i] += up_too[i];
    for (int64_t i = 0; down != nullptr && i < size_down; ++i) down[i] += down_too[i];
  }
  if (grads.x != nullptr) sum_slots(z, grad_x_MD, row_NS, nullptr, grads.x, threads);
}

}  // namespace

// Assignments below E by expert, in their order: order_M (room for N * S), row_NS (-1 for others), start_E (E + 1).
extern "C" void experts_sort(const int64_t* index_NS, int64_t count, int64_t E, int64_t* order_M, int64_t* row_NS,
                             int64_t* start_E) {
  std::fill_n(start_E, E + 1, 0);
  for (int64_t i = 0; i < count; ++i)
    if (index_NS[i] < E) ++start_E[index_NS[i] + 1];
  std::partial_sum(start_E, start_E + E + 1, start_E);
  std::vector<int64_t> next(start_E, start_E + E);
  for (int64_t i = 0; i < count; ++i) {
    row_NS[i] = index_NS[i] < E ? next[index_NS[i]]++ : -1;
    if (row_NS[i] >= 0) order_M[row_NS[i]] = i;
  }
}

extern "C" void experts_forward(const bf16* x, const int64_t* order_M, const int64_t* row_NS, const int64_t* start_E,
                                const float* weight, const void* w_gate_up, const void* w_down, bf16* gate_up_MX,
                                bf16* out_MD, bf16* y, int64_t N, int64_t S, int64_t D, int64_t F, int64_t E,
                                int64_t rounded, int64_t threads) {
  const Sizes z{N, S, D, F, E};
  auto run = [&](auto* up, auto* down) {
    forward(z, x, order_M, row_NS, start_E, weight, up, down, gate_up_MX, out_MD, y, threads);
  };
  if (rounded) run(static_cast<const bf16*>(w_gate_up), static_cast<const bf16*>(w_down));
  else run(static_cast<const float*>(w_gate_up), static_cast<const float*>(w_down));
}

extern "C" void experts_backward(const bf16* dy, const bf16* x, const int64_t* order_M, const int64_t* row_NS,
                                 const int64_t* start_E, const float* weight, const void* w_gate_up,
                                 const void* w_down, const bf16* gate_up_MX, bf16* grad_x_MD, bf16* grad_x,
                                 float* grad_weight, float* grad_up, float* grad_down, int64_t N, int64_t S,
                                 int64_t D, int64_t F, int64_t E, int64_t rounded, int64_t threads) {
  const Sizes z{N, S, D, F, E};
  const Gradients grads{grad_x, grad_weight, grad_up, grad_down};
  auto run = [&](auto* up, auto* down) {
    backward(z, dy, x, order_M, row_NS, start_E, weight, up, down, gate_up_MX, grad_x_MD, grads, threads);
  };
  if (rounded) run(static_cast<const bf16*>(w_gate_up), static_cast<const bf16*>(w_down));
  else run(static_cast<const float*>(w_gate_up), static_cast<const float*>(w_down));
}
