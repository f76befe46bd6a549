// sgd_momentum_buffer_softsign4: momentum_buffer_0 softsign4; 13.03 bytes per element
#include "stq_kernel.h"

struct Row {
  float* param_0;
  float* grad_0;
  uint8_t* momentum_buffer_0_codes;
  uint16_t* momentum_buffer_0_scales;
  uint64_t momentum_buffer_0_key;
  int64_t numel;
  int64_t first_block;
};

struct Scalars {
  uint64_t momentum_buffer_0_key;
};

static void scalars(const Row& row, uint64_t step, Scalars& s) {
  s.momentum_buffer_0_key = stq::stream_key(row.momentum_buffer_0_key, step);
}

template <bool tail>
STQ_INLINE void tile(const Row& row, const Scalars& s, uint64_t step, int64_t first,
                     int blocks, int count) {
  constexpr int size = tail ? 1 : stq::kTile;
  float param_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(param_0_tail, row.param_0 + first * stq::kBlock, count * 4);
  float grad_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(grad_0_tail, row.grad_0 + first * stq::kBlock, count * 4);
  stq::f32v mul_tensor_table[size];
  stq::f32v add_tensor[size][stq::kPlanes];
  const stq::i32b momentum_buffer_0_word = stq::load_words(row.momentum_buffer_0_scales + first, blocks, 1);  // momentum_buffer_0
  const stq::i32b momentum_buffer_0_shift_left = momentum_buffer_0_word << 16;  // momentum_buffer_0
  const stq::f32b momentum_buffer_0_from_bits = stq::from_bits(momentum_buffer_0_shift_left);  // momentum_buffer_0
  stq::i32v momentum_buffer_0_new_absmax_tile[stq::kTile]{};
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j;
    const stq::i32v momentum_buffer_0_int_sub_table = stq::iota() - 7;  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_to_float_table = stq::to_float(momentum_buffer_0_int_sub_table);  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_abs_table = stq::abs(momentum_buffer_0_to_float_table);  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_sub_table = 14.0f - momentum_buffer_0_abs_table;  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_div_table = momentum_buffer_0_to_float_table / momentum_buffer_0_sub_table;  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_table = momentum_buffer_0_div_table * momentum_buffer_0_from_bits[j];  // momentum_buffer_0
    mul_tensor_table[j] = momentum_buffer_0_table * 0.9f;  // mul_tensor
  }
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j;
    float* param_0 = tail ? param_0_tail : row.param_0 + index * stq::kBlock;
    float* grad_0 = tail ? grad_0_tail : row.grad_0 + index * stq::kBlock;
    uint8_t* momentum_buffer_0_codes = row.momentum_buffer_0_codes + index * 64;
    const stq::Nibbles momentum_buffer_0_codes_nibbles = stq::nibbles<4>(momentum_buffer_0_codes);
    stq::i32v momentum_buffer_0_new_absmax_lanes{};
#pragma GCC unroll 8
    for (int p = 0; p < stq::kPlanes; ++p) {
      const stq::f32v param_0_1 = stq::load(param_0 + p * stq::kLanes);  // param_0  param
      const stq::f32v grad_0_1 = stq::load(grad_0 + p * stq::kLanes);  // grad_0  grad
      const stq::i32v momentum_buffer_0_code = stq::index(momentum_buffer_0_codes_nibbles, p);  // momentum_buffer_0
      const stq::f32v mul_tensor = stq::lookup(mul_tensor_table[j], momentum_buffer_0_code);  // mul_tensor
      add_tensor[j][p] = mul_tensor + grad_0_1;  // add_tensor
      const stq::f32v mul_tensor_1 = add_tensor[j][p] * 0.01f;  // mul_tensor_1
      const stq::f32v sub_tensor = param_0_1 - mul_tensor_1;  // sub_tensor
      const stq::i32v momentum_buffer_0_new_bits_of = stq::bits_of(add_tensor[j][p]);  // momentum_buffer_0_new
      const stq::i32v momentum_buffer_0_new_int_and = momentum_buffer_0_new_bits_of & 2147483647;  // momentum_buffer_0_new
      const stq::i32v momentum_buffer_0_new_int_select = stq::select((tail ? stq::valid(p, count) : stq::all(true)), momentum_buffer_0_new_int_and, stq::all(0));  // momentum_buffer_0_new
      momentum_buffer_0_new_absmax_lanes = stq::max(momentum_buffer_0_new_absmax_lanes, momentum_buffer_0_new_int_select);  // momentum_buffer_0_new
      stq::store(param_0 + p * stq::kLanes, sub_tensor);  // -> param_0
    }
    momentum_buffer_0_new_absmax_tile[j] = momentum_buffer_0_new_absmax_lanes;  // momentum_buffer_0_new
  }
  const stq::i32b momentum_buffer_0_new_absmax = stq::max_lanes(momentum_buffer_0_new_absmax_tile);  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_add = momentum_buffer_0_new_absmax + 65535;  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_shift_right = momentum_buffer_0_new_int_add >> 16;  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_max = stq::max(momentum_buffer_0_new_shift_right, stq::each(128));  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_min = stq::min(momentum_buffer_0_new_int_max, stq::each(32639));  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_eq = momentum_buffer_0_new_absmax == 0;  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_select_1 = stq::select(momentum_buffer_0_new_int_eq, stq::each(0), momentum_buffer_0_new_int_min);  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_lt = 2139095040 < momentum_buffer_0_new_absmax;  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_select_2 = stq::select(momentum_buffer_0_new_int_lt, stq::each(32704), stq::each(32640));  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_lt_1 = momentum_buffer_0_new_absmax < 2139095040;  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_int_select_3 = stq::select(momentum_buffer_0_new_int_lt_1, momentum_buffer_0_new_int_select_1, momentum_buffer_0_new_int_select_2);  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_shift_left = momentum_buffer_0_new_int_select_3 << 16;  // momentum_buffer_0_new
  const stq::f32b momentum_buffer_0_new_from_bits = stq::from_bits(momentum_buffer_0_new_shift_left);  // momentum_buffer_0_new
  const stq::i32b momentum_buffer_0_new_gt = momentum_buffer_0_new_from_bits > 0.0f;  // momentum_buffer_0_new
  const stq::f32b momentum_buffer_0_new_div = 1.0f / momentum_buffer_0_new_from_bits;  // momentum_buffer_0_new
  const stq::f32b momentum_buffer_0_new_select = stq::select(momentum_buffer_0_new_gt, momentum_buffer_0_new_div, stq::each(0.0f));  // momentum_buffer_0_new
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j;
    uint8_t* momentum_buffer_0_codes = row.momentum_buffer_0_codes + index * 64;
    stq::BlockKey momentum_buffer_0_key = stq::block_key(s.momentum_buffer_0_key, step, row.first_block + index);
    stq::i32v getitem[stq::kPlanes];
#pragma GCC unroll 8
    for (int p = 0; p < stq::kPlanes; ++p) {
      const stq::f32v momentum_buffer_0_new_abs = stq::abs(add_tensor[j][p]);  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_mul = momentum_buffer_0_new_abs * momentum_buffer_0_new_select[j];  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_min = stq::min(momentum_buffer_0_new_mul, stq::all(1.0f));  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_add = momentum_buffer_0_new_min + 1.0f;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_mul_1 = momentum_buffer_0_new_min * 14.0f;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_div_1 = momentum_buffer_0_new_mul_1 / momentum_buffer_0_new_add;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_floor = stq::floor(momentum_buffer_0_new_div_1);  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_sub = momentum_buffer_0_new_div_1 - momentum_buffer_0_new_floor;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_sub_1 = 13.0f - momentum_buffer_0_new_floor;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_mul_2 = momentum_buffer_0_new_sub * momentum_buffer_0_new_sub_1;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_mul_3 = momentum_buffer_0_new_add * 1.1983726e+06f;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_mul_4 = momentum_buffer_0_new_mul_2 * momentum_buffer_0_new_mul_3;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_momentum_buffer_0_key = stq::random24(momentum_buffer_0_key);  // momentum_buffer_0_new
      const stq::i32v momentum_buffer_0_new_lt = momentum_buffer_0_new_momentum_buffer_0_key < momentum_buffer_0_new_mul_4;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_add_1 = momentum_buffer_0_new_floor + 1.0f;  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_select_1 = stq::select(momentum_buffer_0_new_lt, momentum_buffer_0_new_add_1, momentum_buffer_0_new_floor);  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_copysign = stq::copysign(momentum_buffer_0_new_select_1, add_tensor[j][p]);  // momentum_buffer_0_new
      const stq::f32v momentum_buffer_0_new_add_2 = momentum_buffer_0_new_copysign + 7.0f;  // momentum_buffer_0_new
      const stq::i32v momentum_buffer_0_new_to_int = stq::to_int(momentum_buffer_0_new_add_2);  // momentum_buffer_0_new
      getitem[p] = stq::select((tail ? stq::valid(p, count) : stq::all(true)), momentum_buffer_0_new_to_int, stq::all(0));  // momentum_buffer_0_new
    }
    stq::pack<4>(momentum_buffer_0_codes, getitem);  // -> momentum_buffer_0_codes
    row.momentum_buffer_0_scales[index] = static_cast<uint16_t>(momentum_buffer_0_new_int_select_3[j]);  // -> momentum_buffer_0_scales
  }
  if constexpr (tail) std::memcpy(row.param_0 + first * stq::kBlock, param_0_tail, count * 4);
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

