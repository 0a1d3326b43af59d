// The expert op on a CPU: SwiGLU experts over rows sorted by expert, forward and backward, each in one
// pass over the experts and one over the tokens. M rows: assignments to FFN experts, in the order of
// the experts, those of an expert in the order of tokens. Rows pass in tiles that stay in cache;
// weights are the masters themselves, packed and rounded to bf16 expert by expert.
//
// No result depends on the number of threads: a piece of an expert's rows is one task, pieces depend on
// the loads alone, and what meets (pieces in a weight's gradient, experts in a token) is added in a
// fixed order.
#include <numeric>

#include "kernels.h"

using namespace moebius;

namespace {

constexpr int64_t TILE = 192;  // most rows of a product
constexpr int64_t STEP = 16;   // a product's rows are padded to its multiples, so that shapes are few;
constexpr int64_t EVEN = 32;   // where rows are summed over, to these
constexpr int64_t PIECES = 16;
constexpr int64_t AHEAD = 8;  // rows
constexpr int64_t LINE = 32;  // values of a cache line

struct Sizes {
  int64_t N, S, D, F, E;
};

// Where rows come from and go: the assignment (n * S + s) of each row, the row of each assignment (-1
// where it has none), the first row of each expert, and the weights of the assignments.
struct Routing {
  const int64_t *order_M, *row_NS, *start_E;
  const float* weight_NS;
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

// Tiles of about equal length for so many rows.
int64_t tile_of(int64_t rows) {
  const int64_t tiles = (rows + TILE - 1) / TILE;
  return round_up((rows + tiles - 1) / tiles, STEP);
}

// The tokens x [N,D] of some assignments, zeros up to `padded`. They lie anywhere, so those ahead are
// asked for early.
void gather(const Sizes& z, const bf16* x, const int64_t* order, int64_t rows, int64_t padded,
            bf16* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const bf16* from = x + order[i] / z.S * z.D;
    const bf16* next = x + order[std::min(i + AHEAD, rows - 1)] / z.S * z.D;
    for (int64_t d = 0; d < z.D; d += LINE) {
      _mm_prefetch(next + d, _MM_HINT_T0);
      _mm512_storeu_si512(out + i * z.D + d, _mm512_loadu_si512(from + d));
    }
  }
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
    for (int64_t n = block * BLOCK; n < end; ++n) {
      const int64_t *row_S = row_NS + n * z.S, *next_S = row_NS + std::min(n + 2, z.N - 1) * z.S;
      for (int64_t d = 0; d < z.D; d += LINE) {
        __m512 low = _mm512_setzero_ps(), high = low;
        for (int64_t s = 0; s < z.S; ++s) {
          _mm_prefetch(out_MD + std::max<int64_t>(0, next_S[s]) * z.D + d, _MM_HINT_T0);
          if (row_S[s] < 0) continue;
          const bf16* from = out_MD + row_S[s] * z.D + d;
          const __m512 w = _mm512_set1_ps(weight == nullptr ? 1.0f : weight[n * z.S + s]);
          low = _mm512_fmadd_ps(w, load16(from), low);
          high = _mm512_fmadd_ps(w, load16(from + 16), high);
        }
        store16(y + n * z.D + d, low);
        store16(y + n * z.D + d + 16, high);
      }
    }
  });
}

struct ForwardScratch {
  explicit ForwardScratch(const Sizes& z)
      : gate_up(2 * z.F * z.D),
        down(z.F * z.D),
        x(TILE * z.D),
        hidden(TILE * z.F),
        sums(TILE * std::max(2 * z.F, z.D)) {}
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
void forward(const Sizes& z, const Routing& route, const bf16* x, const W* w_gate_up, const W* w_down,
             bf16* gate_up_MX, bf16* out_MD, bf16* y, int64_t threads) {
  const auto pieces = pieces_of(z, route.start_E);
  auto scratch = [&] { return std::make_unique<ForwardScratch>(z); };
  parallel(threads, pieces.size(), scratch, [&](int64_t task, auto& own) {
    const Piece& piece = pieces[task];
    if (piece.rows == 0) return;
    pack_transposed(w_gate_up + piece.expert * 2 * z.F * z.D, z.D, z.D, 2 * z.F, own->gate_up);
    pack_transposed(w_down + piece.expert * z.D * z.F, z.F, z.F, z.D, own->down);
    const int64_t tile = tile_of(piece.rows);
    for (int64_t done = 0; done < piece.rows; done += tile) {
      const int64_t first = piece.first + done, rows = std::min(tile, piece.rows - done);
      const int64_t padded = round_up(rows, STEP);
      gather(z, x, route.order_M + first, rows, padded, own->x);
      product(padded, 2 * z.F, z.D, own->x, z.D, own->gate_up, own->sums, 2 * z.F, false);
      bf16* kept = gate_up_MX == nullptr ? nullptr : gate_up_MX + first * 2 * z.F;
      activate(z, own->sums, rows, own->hidden, kept);
      std::memset(own->hidden + rows * z.F, 0, (padded - rows) * z.F * 2);
      product(padded, z.D, z.F, own->hidden, z.F, own->down, own->sums, z.D, false);
      round_rows(own->sums, rows * z.D, out_MD + first * z.D);
    }
  });
  sum_slots(z, out_MD, route.row_NS, route.weight_NS, y, threads);
}

struct BackwardScratch {
  explicit BackwardScratch(const Sizes& z)
      : gate_up(2 * z.F * z.D),
        down(z.F * z.D),
        rows(TILE * z.D),
        hidden(TILE * z.F),
        grad_gate_up(TILE * 2 * z.F),
        packed(TILE * std::max(z.F, z.D)),
        turned(TILE * std::max(2 * z.F, z.D)),
        sums(TILE * std::max(z.F, z.D)) {}
  Buffer<bf16> gate_up, down, rows, hidden, grad_gate_up, packed, turned;
  Buffer<float> sums;
};

// From the gradients dh of `hidden` before its weight: those of gate and up and of the weight; and the
// weighted hidden.
void activate_backward(const Sizes& z, const bf16* gate_up, const float* dh, const int64_t* order,
                       int64_t rows, const float* weight, bf16* grad_gate_up, bf16* hidden,
                       float* grad_weight) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 w = _mm512_set1_ps(weight[order[i]]);
    __m512 dot = _mm512_setzero_ps();
    for (int64_t f = 0; f < z.F; f += 16) {
      const __m512 gate = load16(gate_up + f), up = load16(gate_up + z.F + f), grad = load16(dh + f);
      const __m512 sigmoid = sigmoid16(gate), silu = _mm512_mul_ps(gate, sigmoid);
      const __m512 value = _mm512_mul_ps(silu, up), weighted = _mm512_mul_ps(w, grad);
      const __m512 rest = _mm512_fmadd_ps(gate, _mm512_sub_ps(one, sigmoid), one);
      const __m512 slope = _mm512_mul_ps(sigmoid, rest);
      dot = _mm512_fmadd_ps(value, grad, dot);
      store16(hidden + f, _mm512_mul_ps(w, value));
      store16(grad_gate_up + f, _mm512_mul_ps(_mm512_mul_ps(weighted, up), slope));
      store16(grad_gate_up + z.F + f, _mm512_mul_ps(weighted, silu));
    }
    grad_weight[order[i]] = _mm512_reduce_add_ps(dot);
    gate_up += 2 * z.F, grad_gate_up += 2 * z.F, dh += z.F, hidden += z.F;
  }
}

// c[I,O] = a^T b over `rows` of a [rows,I] and b [rows,O], or += where `add`.
void sum_over_rows(BackwardScratch& own, int64_t rows, const bf16* a, int64_t I, const bf16* b,
                   int64_t O, float* c, bool add) {
  transpose(a, I, rows, I, own.turned, rows);
  pack(b, O, rows, O, own.packed);
  product(I, O, rows, own.turned, rows, own.packed, c, O, add);
}

// The gradients of the two weights, whole [E,...] and what the further pieces of long experts add.
struct WeightGradient {
  WeightGradient(float* whole, int64_t size, int64_t parts)
      : whole(whole), size(size), parts(whole == nullptr ? 0 : parts * size) {}

  float* place(const Piece& piece) {
    if (whole == nullptr) return nullptr;
    return piece.part == 0 ? whole + piece.expert * size : parts + (piece.part - 1) * size;
  }

  // Add the parts to their experts, in the order of the rows.
  void join(const std::vector<Piece>& further, int64_t threads) {
    if (whole == nullptr || further.empty()) return;
    constexpr int64_t BLOCK = 1 << 14;
    auto none = [] { return 0; };
    parallel(threads, (size + BLOCK - 1) / BLOCK, none, [&](int64_t block, int) {
      const int64_t end = std::min(size, (block + 1) * BLOCK);
      for (const Piece& piece : further) {
        float *to = whole + piece.expert * size, *from = place(piece);
        for (int64_t i = block * BLOCK; i < end; ++i) to[i] += from[i];
      }
    });
  }

  float* whole;
  int64_t size;
  Buffer<float> parts;
};

struct Gradients {
  bf16 *x_MD, *x;
  float *weight, *gate_up, *down;
};

template <typename W>
void backward(const Sizes& z, const Routing& route, const bf16* dy, const bf16* x, const W* w_gate_up,
              const W* w_down, const bf16* gate_up_MX, const Gradients& grads, int64_t threads) {
  const auto pieces = pieces_of(z, route.start_E);
  const int64_t size_up = 2 * z.F * z.D, size_down = z.D * z.F, parts = pieces.size() - z.E;
  WeightGradient up(grads.gate_up, size_up, parts), down(grads.down, size_down, parts);
  auto scratch = [&] { return std::make_unique<BackwardScratch>(z); };
  parallel(threads, pieces.size(), scratch, [&](int64_t task, auto& own) {
    const Piece& piece = pieces[task];
    float *grad_up = up.place(piece), *grad_down = down.place(piece);
    if (piece.rows == 0) {
      if (grad_up != nullptr) std::fill_n(grad_up, size_up, 0.0f);
      if (grad_down != nullptr) std::fill_n(grad_down, size_down, 0.0f);
      return;
    }
    pack(w_down + piece.expert * size_down, z.F, z.D, z.F, own->down);
    if (grads.x != nullptr) {
      pack(w_gate_up + piece.expert * size_up, z.D, 2 * z.F, z.D, own->gate_up);
    }
    const int64_t tile = tile_of(piece.rows);
    for (int64_t done = 0; done < piece.rows; done += tile) {
      const int64_t first = piece.first + done, rows = std::min(tile, piece.rows - done);
      const int64_t padded = round_up(rows, STEP), even = round_up(rows, EVEN);
      const int64_t* order = route.order_M + first;
      gather(z, dy, order, rows, even, own->rows);
      product(padded, z.F, z.D, own->rows, z.D, own->down, own->sums, z.F, false);
      activate_backward(z, gate_up_MX + first * 2 * z.F, own->sums, order, rows, route.weight_NS,
                        own->grad_gate_up, own->hidden, grads.weight);
      std::memset(own->hidden + rows * z.F, 0, (even - rows) * z.F * 2);
      std::memset(own->grad_gate_up + rows * 2 * z.F, 0, (even - rows) * 2 * z.F * 2);
      if (grad_down != nullptr) {
        sum_over_rows(*own, even, own->rows, z.D, own->hidden, z.F, grad_down, done > 0);
      }
      if (grad_up != nullptr) {
        gather(z, x, order, rows, even, own->rows);
        sum_over_rows(*own, even, own->grad_gate_up, 2 * z.F, own->rows, z.D, grad_up, done > 0);
      }
      if (grads.x == nullptr) continue;
      product(padded, z.D, 2 * z.F, own->grad_gate_up, 2 * z.F, own->gate_up, own->sums, z.D, false);
      round_rows(own->sums, rows * z.D, grads.x_MD + first * z.D);
    }
  });
  std::vector<Piece> further(parts);
  for (const Piece& piece : pieces)
    if (piece.part > 0) further[piece.part - 1] = piece;
  up.join(further, threads);
  down.join(further, threads);
  if (grads.x != nullptr) sum_slots(z, grads.x_MD, route.row_NS, nullptr, grads.x, threads);
}

}  // namespace

// Assignments below E by expert, in their order: order_M (room for N * S), row_NS (-1 for the others),
// start_E (E + 1).
extern "C" void experts_sort(const int64_t* index_NS, int64_t count, int64_t E, int64_t* order_M,
                             int64_t* row_NS, int64_t* start_E) {
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

// `rounded`: the weights are bf16, not fp32. gate_up_MX is null where there will be no backward.
extern "C" void experts_forward(const int64_t* order_M, const int64_t* row_NS, const int64_t* start_E,
                                const float* weight_NS, const bf16* x, const void* w_gate_up,
                                const void* w_down, bf16* gate_up_MX, bf16* out_MD, bf16* y,
                                int64_t N, int64_t S, int64_t D, int64_t F, int64_t E,
                                int64_t rounded, int64_t threads) {
  const Sizes z{N, S, D, F, E};
  const Routing route{order_M, row_NS, start_E, weight_NS};
  auto run = [&]<typename W>(const W* w_gate_up, const void* w_down) {
    forward(z, route, x, w_gate_up, static_cast<const W*>(w_down), gate_up_MX, out_MD, y, threads);
  };
  if (rounded) {
    run(static_cast<const bf16*>(w_gate_up), w_down);
  } else {
    run(static_cast<const float*>(w_gate_up), w_down);
  }
}

// A gradient that is not wanted is null; that of `weight` is wanted always.
extern "C" void experts_backward(const int64_t* order_M, const int64_t* row_NS,
                                 const int64_t* start_E, const float* weight_NS, const bf16* x,
                                 const void* w_gate_up, const void* w_down, const bf16* gate_up_MX,
                                 const bf16* dy, bf16* grad_x_MD, bf16* grad_x, float* grad_weight,
                                 float* grad_up, float* grad_down, int64_t N, int64_t S, int64_t D,
                                 int64_t F, int64_t E, int64_t rounded, int64_t threads) {
  const Sizes z{N, S, D, F, E};
  const Routing route{order_M, row_NS, start_E, weight_NS};
  const Gradients grads{grad_x_MD, grad_x, grad_weight, grad_up, grad_down};
  auto run = [&]<typename W>(const W* w_gate_up, const void* w_down) {
    backward(z, route, dy, x, w_gate_up, static_cast<const W*>(w_down), gate_up_MX, grads, threads);
  };
  if (rounded) {
    run(static_cast<const bf16*>(w_gate_up), w_down);
  } else {
    run(static_cast<const float*>(w_gate_up), w_down);
  }
}
