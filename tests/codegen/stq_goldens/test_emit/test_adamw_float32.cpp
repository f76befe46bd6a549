// adamw: float32 states; 28.00 bytes per element
#include "stq_kernel.h"

struct Row {
  double lr;
  float* step_0;
  float* param_0;
  float* grad_0;
  float* exp_avg_0;
  float* exp_avg_sq_0;
  int64_t numel;
  int64_t first_block;
};

struct Scalars {
  float sub_1;
  float mul_4_1;
  float div_1;
};

static void scalars(const Row& row, uint64_t step, Scalars& s) {
  const double lr_1 = row.lr;  // lr  scalar
  const double step_0_1 = *row.step_0;  // step_0  state
  const double add_1 = step_0_1 + 1.0;  // add  adam.py:414 step_t += 1
  const double mul_1 = lr_1 * 0.1;  // mul
  const double sub_1 = 1.0 - mul_1;  // sub
  const double pow_1 = stq::pow(0.9, add_1);  // pow_1
  const double sub_2_1 = 1.0 - pow_1;  // sub_2
  const double pow_2 = stq::pow(0.99, add_1);  // pow_2
  const double sub_3_1 = 1.0 - pow_2;  // sub_3
  const double reciprocal = 1.0 / sub_2_1;  // reciprocal  adam.py:489 step_size = lr / correction1
  const double mul_4_1 = reciprocal * lr_1;  // mul_4  adam.py:489 step_size = lr / correction1
  const double div_1 = 1.0 / sub_3_1;  // div
  *row.step_0 = static_cast<float>(add_1);  // -> step_0
  s.sub_1 = static_cast<float>(sub_1);
  s.mul_4_1 = static_cast<float>(mul_4_1);
  s.div_1 = static_cast<float>(div_1);
}

template <bool tail>
STQ_INLINE void tile(const Row& row, const Scalars& s, uint64_t step, int64_t first,
                     int blocks, int count) {
  constexpr int size = tail ? 1 : stq::kTile;
  float param_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(param_0_tail, row.param_0 + first * stq::kBlock, count * 4);
  float grad_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(grad_0_tail, row.grad_0 + first * stq::kBlock, count * 4);
  float exp_avg_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(exp_avg_0_tail, row.exp_avg_0 + first * stq::kBlock, count * 4);
  float exp_avg_sq_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(exp_avg_sq_0_tail, row.exp_avg_sq_0 + first * stq::kBlock, count * 4);
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j;
    float* param_0 = tail ? param_0_tail : row.param_0 + index * stq::kBlock;
    float* grad_0 = tail ? grad_0_tail : row.grad_0 + index * stq::kBlock;
    float* exp_avg_0 = tail ? exp_avg_0_tail : row.exp_avg_0 + index * stq::kBlock;
    float* exp_avg_sq_0 = tail ? exp_avg_sq_0_tail : row.exp_avg_sq_0 + index * stq::kBlock;
#pragma GCC unroll 8
    for (int p = 0; p < stq::kPlanes; ++p) {
      const stq::f32v param_0_1 = stq::load(param_0 + p * stq::kLanes);  // param_0  param
      const stq::f32v grad_0_1 = stq::load(grad_0 + p * stq::kLanes);  // grad_0  grad
      const stq::f32v exp_avg_0_1 = stq::load(exp_avg_0 + p * stq::kLanes);  // exp_avg_0  state
      const stq::f32v exp_avg_sq_0_1 = stq::load(exp_avg_sq_0 + p * stq::kLanes);  // exp_avg_sq_0  state
      const stq::f32v mul_1_1 = param_0_1 * s.sub_1;  // mul_1  adam.py:418 param.mul_(1 - lr * weight_decay)
      const stq::f32v sub_1_1 = grad_0_1 - exp_avg_0_1;  // sub_1  adam.py:448 exp_avg.lerp_(grad, 1 - beta1)
      const stq::f32v fma_1 = stq::fma(sub_1_1, stq::all(0.1f), exp_avg_0_1);  // fma  adam.py:448 exp_avg.lerp_(grad, 1 - beta1)
      const stq::f32v mul_2_1 = exp_avg_sq_0_1 * 0.99f;  // mul_2  adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
      const stq::f32v mul_3_1 = grad_0_1 * 0.01f;  // mul_3  adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
      const stq::f32v fma_1_1 = stq::fma(mul_3_1, grad_0_1, mul_2_1);  // fma_1  adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
      const stq::f32v div_2 = fma_1_1 * s.div_1;  // div
      const stq::f32v sqrt_1 = stq::sqrt(div_2);  // sqrt  adam.py:520 denom = v.sqrt()
      const stq::f32v add_1_1 = sqrt_1 + 1e-08f;  // add_1
      const stq::f32v div_1_1 = fma_1 / add_1_1;  // div_1
      const stq::f32v mul_5_1 = div_1_1 * s.mul_4_1;  // mul_5
      const stq::f32v sub_4_1 = mul_1_1 - mul_5_1;  // sub_4  adam.py:524 param.addcdiv_(exp_avg, denom)
      stq::store(param_0 + p * stq::kLanes, sub_4_1);  // -> param_0
      stq::store(exp_avg_0 + p * stq::kLanes, fma_1);  // -> exp_avg_0
      stq::store(exp_avg_sq_0 + p * stq::kLanes, fma_1_1);  // -> exp_avg_sq_0
    }
  }
  if constexpr (tail) std::memcpy(row.param_0 + first * stq::kBlock, param_0_tail, count * 4);
  if constexpr (tail) std::memcpy(row.exp_avg_0 + first * stq::kBlock, exp_avg_0_tail, count * 4);
  if constexpr (tail) std::memcpy(row.exp_avg_sq_0 + first * stq::kBlock, exp_avg_sq_0_tail, count * 4);
}

// One row per tensor. Work is spread over blocks, not tensors; threads is what torch uses.
extern "C" void run(const Row* rows, int64_t n_rows, uint64_t step, int threads, void* scratch) {
  int64_t* start = static_cast<int64_t*>(scratch);
  Scalars* s = reinterpret_cast<Scalars*>(start + n_rows + 1);
  start[0] = 0;
  for (int64_t r = 0; r < n_rows; ++r) {
    scalars(rows[r], step, s[r]);
    start[r + 1] = start[r] + (rows[r].numel + stq::kBlock - 1) / stq::kBlock;
  }
  const int64_t blocks = start[n_rows];
  const int workers = blocks < 1024 ? 1 : threads;  // a thread is worth 0.1 ms of work
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (int w = 0; w < workers; ++w) {
    int64_t b = blocks * w / workers;
    const int64_t end = blocks * (w + 1) / workers;
    int64_t r = 0;
    while (b < end) {
      while (start[r + 1] <= b) ++r;
      const int64_t last = rows[r].numel / stq::kBlock;  // whole blocks of this tensor
      const int64_t stop = (end < start[r + 1] ? end : start[r + 1]) - start[r];
      const int64_t whole = stop < last ? stop : last;
      int64_t i = b - start[r];
      const Row row = rows[r];  // copies, which no store through a pointer can change
      const Scalars scalar = s[r];
      for (; i < whole; i += stq::kTile) {
        const int64_t left = whole - i;
        const int blocks = left < stq::kTile ? static_cast<int>(left) : stq::kTile;
        tile<false>(row, scalar, step, i, blocks, stq::kBlock);
      }
      if (stop > last) {
        const int count = static_cast<int>(row.numel - last * stq::kBlock);
        tile<true>(row, scalar, step, last, 1, count);
      }
      b = start[r] + stop;
    }
  }
}

extern "C" int64_t scratch_bytes(int64_t n_rows, int) {
  static_assert(alignof(Scalars) <= 8);
  return n_rows * sizeof(Scalars) + (n_rows + 1) * 8;
}

extern "C" int64_t row_bytes() { return sizeof(Row); }

