// adamw_exp_avg_softsign4_exp_avg_sq_adaptive_log3: exp_avg_0 softsign4, exp_avg_sq_0 adaptive_log3; 13.81 bytes per element
#include "stq_kernel.h"

struct Row {
  double lr;
  float* step_0;
  float* param_0;
  float* grad_0;
  uint8_t* exp_avg_0_codes;
  uint16_t* exp_avg_0_scales;
  uint64_t exp_avg_0_key;
  uint8_t* exp_avg_sq_0_codes;
  uint16_t* exp_avg_sq_0_scales;
  uint64_t exp_avg_sq_0_key;
  int64_t numel;
  int64_t first_block;
};

struct Scalars {
  uint64_t exp_avg_0_key;
  uint64_t exp_avg_sq_0_key;
  float sub_1;
  float mul_4_1;
  float div_1;
};

static void scalars(const Row& row, uint64_t step, Scalars& s) {
  s.exp_avg_0_key = stq::stream_key(row.exp_avg_0_key, step);
  s.exp_avg_sq_0_key = stq::stream_key(row.exp_avg_sq_0_key, step);
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
  stq::f32v exp_avg_0_table[size];
  stq::f32v fma_1[size][stq::kPlanes];
  stq::f32v mul_2_1_table[size];
  stq::f32v exp_avg_sq_0_new_to_float_1[size][stq::kPlanes];
  const stq::i32b exp_avg_0_word = stq::load_words(row.exp_avg_0_scales + first, blocks, 1);  // exp_avg_0
  const stq::i32b exp_avg_0_shift_left = exp_avg_0_word << 16;  // exp_avg_0
  const stq::f32b exp_avg_0_from_bits = stq::from_bits(exp_avg_0_shift_left);  // exp_avg_0
  const stq::i32b exp_avg_sq_0_word = stq::load_words(row.exp_avg_sq_0_scales + first, blocks, 1);  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_shift_right = exp_avg_sq_0_word >> 5;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_shift_left = exp_avg_sq_0_shift_right << 20;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_lt = 0 < exp_avg_sq_0_shift_left;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_lt_1 = exp_avg_sq_0_shift_left < 2139095040;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_and = exp_avg_sq_0_int_lt & exp_avg_sq_0_int_lt_1;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_and = exp_avg_sq_0_word & 31;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_add = exp_avg_sq_0_int_and + 1;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_mul = exp_avg_sq_0_int_add * 524288;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_select = stq::select(exp_avg_sq_0_and, exp_avg_sq_0_int_mul, stq::each(0));  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_mul_1 = exp_avg_sq_0_int_select * 7;  // exp_avg_sq_0
  const stq::i32b exp_avg_sq_0_int_sub = exp_avg_sq_0_shift_left - exp_avg_sq_0_int_mul_1;  // exp_avg_sq_0
  stq::i32v exp_avg_0_new_absmax_tile[stq::kTile]{};
  stq::i32v exp_avg_sq_0_new_absmax_tile[stq::kTile]{};
  stq::f32v exp_avg_sq_0_new_block_sum_tile[stq::kTile]{};
  stq::f32v exp_avg_sq_0_new_block_squares_tile[stq::kTile]{};
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j;
    const stq::i32v exp_avg_0_int_sub_table = stq::iota() - 7;  // exp_avg_0
    const stq::f32v exp_avg_0_to_float_table = stq::to_float(exp_avg_0_int_sub_table);  // exp_avg_0
    const stq::f32v exp_avg_0_abs_table = stq::abs(exp_avg_0_to_float_table);  // exp_avg_0
    const stq::f32v exp_avg_0_sub_table = 14.0f - exp_avg_0_abs_table;  // exp_avg_0
    const stq::f32v exp_avg_0_div_table = exp_avg_0_to_float_table / exp_avg_0_sub_table;  // exp_avg_0
    exp_avg_0_table[j] = exp_avg_0_div_table * exp_avg_0_from_bits[j];  // exp_avg_0
    const stq::i32v code_of_3_bits = stq::iota() & 7;  // exp_avg_sq_0
    const stq::i32v exp_avg_sq_0_int_mul_2_table = code_of_3_bits * exp_avg_sq_0_int_select[j];  // exp_avg_sq_0
    const stq::i32v exp_avg_sq_0_int_add_1_table = exp_avg_sq_0_int_mul_2_table + exp_avg_sq_0_int_sub[j];  // exp_avg_sq_0
    const stq::f32v exp_avg_sq_0_table = stq::from_bits(exp_avg_sq_0_int_add_1_table);  // exp_avg_sq_0
    mul_2_1_table[j] = exp_avg_sq_0_table * 0.99f;  // mul_2  adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
  }
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j;
    float* param_0 = tail ? param_0_tail : row.param_0 + index * stq::kBlock;
    float* grad_0 = tail ? grad_0_tail : row.grad_0 + index * stq::kBlock;
    uint8_t* exp_avg_0_codes = row.exp_avg_0_codes + index * 64;
    const stq::Nibbles exp_avg_0_codes_nibbles = stq::nibbles<4>(exp_avg_0_codes);
    uint8_t* exp_avg_sq_0_codes = row.exp_avg_sq_0_codes + index * 48;
    const stq::Nibbles exp_avg_sq_0_codes_nibbles = stq::nibbles<3>(exp_avg_sq_0_codes);
    stq::i32v exp_avg_0_new_absmax_lanes{};
    stq::i32v exp_avg_sq_0_new_absmax_lanes{};
    stq::f32v exp_avg_sq_0_new_block_sum_lanes{};
    stq::f32v exp_avg_sq_0_new_block_squares_lanes{};
#pragma GCC unroll 8
    for (int p = 0; p < stq::kPlanes; ++p) {
      const stq::f32v param_0_1 = stq::load(param_0 + p * stq::kLanes);  // param_0  param
      const stq::f32v grad_0_1 = stq::load(grad_0 + p * stq::kLanes);  // grad_0  grad
      const stq::i32v exp_avg_0_code = stq::index(exp_avg_0_codes_nibbles, p);  // exp_avg_0
      const stq::f32v exp_avg_0 = stq::lookup(exp_avg_0_table[j], exp_avg_0_code);  // exp_avg_0
      const stq::i32v exp_avg_sq_0_code = stq::index(exp_avg_sq_0_codes_nibbles, p);  // exp_avg_sq_0
      const stq::f32v mul_1_1 = param_0_1 * s.sub_1;  // mul_1  adam.py:418 param.mul_(1 - lr * weight_decay)
      const stq::f32v sub_1_1 = grad_0_1 - exp_avg_0;  // sub_1  adam.py:448 exp_avg.lerp_(grad, 1 - beta1)
      fma_1[j][p] = stq::fma(sub_1_1, stq::all(0.1f), exp_avg_0);  // fma  adam.py:448 exp_avg.lerp_(grad, 1 - beta1)
      const stq::f32v mul_2_1 = stq::lookup(mul_2_1_table[j], exp_avg_sq_0_code);  // mul_2
      const stq::f32v mul_3_1 = grad_0_1 * 0.01f;  // mul_3  adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
      const stq::f32v fma_1_1 = stq::fma(mul_3_1, grad_0_1, mul_2_1);  // fma_1  adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
      const stq::f32v div_2 = fma_1_1 * s.div_1;  // div
      const stq::f32v sqrt_1 = stq::sqrt(div_2);  // sqrt  adam.py:520 denom = v.sqrt()
      const stq::f32v add_1_1 = sqrt_1 + 1e-08f;  // add_1
      const stq::f32v div_1_1 = fma_1[j][p] / add_1_1;  // div_1
      const stq::f32v mul_5_1 = div_1_1 * s.mul_4_1;  // mul_5
      const stq::f32v sub_4_1 = mul_1_1 - mul_5_1;  // sub_4  adam.py:524 param.addcdiv_(exp_avg, denom)
      const stq::i32v exp_avg_0_new_bits_of = stq::bits_of(fma_1[j][p]);  // exp_avg_0_new  adam.py:448 exp_avg.lerp_(grad, 1 - beta1)
      const stq::i32v exp_avg_0_new_int_and = exp_avg_0_new_bits_of & 2147483647;  // exp_avg_0_new
      const stq::i32v exp_avg_0_new_int_select = stq::select((tail ? stq::valid(p, count) : stq::all(true)), exp_avg_0_new_int_and, stq::all(0));  // exp_avg_0_new
      exp_avg_0_new_absmax_lanes = stq::max(exp_avg_0_new_absmax_lanes, exp_avg_0_new_int_select);  // exp_avg_0_new
      const stq::i32v exp_avg_sq_0_new_bits_of = stq::bits_of(fma_1_1);  // exp_avg_sq_0_new  adam.py:471 exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
      const stq::i32v exp_avg_sq_0_new_int_and = exp_avg_sq_0_new_bits_of & 2147483647;  // exp_avg_sq_0_new
      const stq::i32v exp_avg_sq_0_new_int_select = stq::select((tail ? stq::valid(p, count) : stq::all(true)), exp_avg_sq_0_new_int_and, stq::all(0));  // exp_avg_sq_0_new
      exp_avg_sq_0_new_absmax_lanes = stq::max(exp_avg_sq_0_new_absmax_lanes, exp_avg_sq_0_new_int_select);  // exp_avg_sq_0_new
      const stq::i32v exp_avg_sq_0_new_int_sub_1 = exp_avg_sq_0_new_int_and - exp_avg_sq_0_shift_left[j];  // exp_avg_sq_0_new
      const stq::i32v exp_avg_sq_0_new_int_select_4 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), exp_avg_sq_0_new_int_sub_1, stq::all(0));  // exp_avg_sq_0_new
      exp_avg_sq_0_new_to_float_1[j][p] = stq::to_float(exp_avg_sq_0_new_int_select_4);  // exp_avg_sq_0_new
      const stq::f32v exp_avg_sq_0_new_max = stq::max(exp_avg_sq_0_new_to_float_1[j][p], stq::all(-1.2582912e+08f));  // exp_avg_sq_0_new
      exp_avg_sq_0_new_block_sum_lanes = p == 0 ? exp_avg_sq_0_new_max : exp_avg_sq_0_new_block_sum_lanes + exp_avg_sq_0_new_max;  // exp_avg_sq_0_new
      exp_avg_sq_0_new_block_squares_lanes = p == 0 ? exp_avg_sq_0_new_max * exp_avg_sq_0_new_max : stq::fma(exp_avg_sq_0_new_max, exp_avg_sq_0_new_max, exp_avg_sq_0_new_block_squares_lanes);  // exp_avg_sq_0_new
      stq::store(param_0 + p * stq::kLanes, sub_4_1);  // -> param_0
    }
    exp_avg_0_new_absmax_tile[j] = exp_avg_0_new_absmax_lanes;  // exp_avg_0_new
    exp_avg_sq_0_new_absmax_tile[j] = exp_avg_sq_0_new_absmax_lanes;  // exp_avg_sq_0_new
    exp_avg_sq_0_new_block_sum_tile[j] = exp_avg_sq_0_new_block_sum_lanes;  // exp_avg_sq_0_new
    exp_avg_sq_0_new_block_squares_tile[j] = exp_avg_sq_0_new_block_squares_lanes;  // exp_avg_sq_0_new
  }
  const stq::i32b exp_avg_0_new_absmax = stq::max_lanes(exp_avg_0_new_absmax_tile);  // exp_avg_0_new
  const stq::i32b exp_avg_sq_0_new_absmax = stq::max_lanes(exp_avg_sq_0_new_absmax_tile);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_block_sum = stq::sum_lanes(exp_avg_sq_0_new_block_sum_tile);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_block_squares = stq::sum_lanes(exp_avg_sq_0_new_block_squares_tile);  // exp_avg_sq_0_new
  const stq::i32b exp_avg_0_new_int_add = exp_avg_0_new_absmax + 65535;  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_shift_right = exp_avg_0_new_int_add >> 16;  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_max = stq::max(exp_avg_0_new_shift_right, stq::each(128));  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_min = stq::min(exp_avg_0_new_int_max, stq::each(32639));  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_eq = exp_avg_0_new_absmax == 0;  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_select_1 = stq::select(exp_avg_0_new_int_eq, stq::each(0), exp_avg_0_new_int_min);  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_lt = 2139095040 < exp_avg_0_new_absmax;  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_select_2 = stq::select(exp_avg_0_new_int_lt, stq::each(32704), stq::each(32640));  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_lt_1 = exp_avg_0_new_absmax < 2139095040;  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_int_select_3 = stq::select(exp_avg_0_new_int_lt_1, exp_avg_0_new_int_select_1, exp_avg_0_new_int_select_2);  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_shift_left = exp_avg_0_new_int_select_3 << 16;  // exp_avg_0_new
  const stq::f32b exp_avg_0_new_from_bits = stq::from_bits(exp_avg_0_new_shift_left);  // exp_avg_0_new
  const stq::i32b exp_avg_0_new_gt = exp_avg_0_new_from_bits > 0.0f;  // exp_avg_0_new
  const stq::f32b exp_avg_0_new_div = 1.0f / exp_avg_0_new_from_bits;  // exp_avg_0_new
  const stq::f32b exp_avg_0_new_select = stq::select(exp_avg_0_new_gt, exp_avg_0_new_div, stq::each(0.0f));  // exp_avg_0_new
  const stq::i32b exp_avg_sq_0_new_int_add = exp_avg_sq_0_new_absmax + 1048575;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_shift_right = exp_avg_sq_0_new_int_add >> 20;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_max = stq::max(exp_avg_sq_0_new_shift_right, stq::each(120));  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_min = stq::min(exp_avg_sq_0_new_int_max, stq::each(2039));  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_eq = exp_avg_sq_0_new_absmax == 0;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_select_1 = stq::select(exp_avg_sq_0_new_int_eq, stq::each(0), exp_avg_sq_0_new_int_min);  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_lt = 2139095040 < exp_avg_sq_0_new_absmax;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_select_2 = stq::select(exp_avg_sq_0_new_int_lt, stq::each(2044), stq::each(2040));  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_lt_1 = exp_avg_sq_0_new_absmax < 2139095040;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_select_3 = stq::select(exp_avg_sq_0_new_int_lt_1, exp_avg_sq_0_new_int_select_1, exp_avg_sq_0_new_int_select_2);  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_shift_left = exp_avg_sq_0_new_int_select_3 << 20;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_lt_2 = 0 < exp_avg_sq_0_new_shift_left;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_lt_3 = exp_avg_sq_0_new_shift_left < 2139095040;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_and = exp_avg_sq_0_new_int_lt_2 & exp_avg_sq_0_new_int_lt_3;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_sub = exp_avg_sq_0_shift_left - exp_avg_sq_0_new_shift_left;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_to_float = stq::to_float(exp_avg_sq_0_new_int_sub);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_valid_count = stq::each(tail ? static_cast<float>(count) : 128.0f);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_div = 1.0f / exp_avg_sq_0_new_valid_count;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul = exp_avg_sq_0_new_block_sum * exp_avg_sq_0_new_div;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_1 = exp_avg_sq_0_new_block_squares * exp_avg_sq_0_new_div;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_2 = exp_avg_sq_0_new_mul * exp_avg_sq_0_new_mul;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_sub = exp_avg_sq_0_new_mul_1 - exp_avg_sq_0_new_mul_2;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_max_1 = stq::max(exp_avg_sq_0_new_sub, stq::each(0.0f));  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_add = exp_avg_sq_0_new_mul + exp_avg_sq_0_new_to_float;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_sqrt = stq::sqrt(exp_avg_sq_0_new_max_1);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_neg = -(exp_avg_sq_0_new_add);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_fma = stq::fma(exp_avg_sq_0_new_sqrt, stq::each(1.2815515f), exp_avg_sq_0_new_neg);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_3 = exp_avg_sq_0_new_fma * 2.724784e-07f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_ceil = stq::ceil(exp_avg_sq_0_new_mul_3);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_sub_1 = exp_avg_sq_0_new_ceil - 1.0f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_max_2 = stq::max(exp_avg_sq_0_new_sub_1, stq::each(0.0f));  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_min = stq::min(exp_avg_sq_0_new_max_2, stq::each(31.0f));  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_gt = exp_avg_sq_0_new_to_float > 5.033165e+07f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_select = stq::select(exp_avg_sq_0_new_gt, stq::each(31.0f), exp_avg_sq_0_new_min);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_add_1 = exp_avg_sq_0_new_select + 1.0f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_4 = exp_avg_sq_0_new_add_1 * 524288.0f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_select_1 = stq::select(exp_avg_sq_0_new_and, exp_avg_sq_0_new_mul_4, stq::each(INFINITY));  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_div_1 = 1.0f / exp_avg_sq_0_new_select_1;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_5 = exp_avg_sq_0_new_select_1 * 1.1920929e-07f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_min_1 = stq::min(exp_avg_sq_0_new_mul_5, stq::each(1.0f));  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_6 = exp_avg_sq_0_new_min_1 * 0.125f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_7 = exp_avg_sq_0_new_mul_6 * 0.25f;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_sub_2 = 0.5f - exp_avg_sq_0_new_mul_7;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_sub_3 = 7.5f - exp_avg_sq_0_new_mul_7;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_8 = exp_avg_sq_0_new_to_float * exp_avg_sq_0_new_div_1;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_abs = stq::abs(exp_avg_sq_0_new_mul_8);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_add_2 = exp_avg_sq_0_new_sub_3 + exp_avg_sq_0_new_mul_8;  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_fma_1 = stq::fma(exp_avg_sq_0_new_abs, stq::each(-4.7683716e-07f), exp_avg_sq_0_new_add_2);  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_to_int = stq::to_int(exp_avg_sq_0_new_select);  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_shift_right_1 = exp_avg_sq_0_new_shift_left >> 15;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_or = exp_avg_sq_0_new_shift_right_1 | exp_avg_sq_0_new_to_int;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_eq_1 = exp_avg_sq_0_new_shift_left == 0;  // exp_avg_sq_0_new
  const stq::i32b exp_avg_sq_0_new_int_select_5 = stq::select(exp_avg_sq_0_new_int_eq_1, stq::each(0), exp_avg_sq_0_new_int_or);  // exp_avg_sq_0_new
  const stq::f32b exp_avg_sq_0_new_mul_9 = exp_avg_sq_0_new_mul_6 * 5.420928e-20f;  // exp_avg_sq_0_new
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j;
    uint8_t* exp_avg_0_codes = row.exp_avg_0_codes + index * 64;
    stq::BlockKey exp_avg_0_key = stq::block_key(s.exp_avg_0_key, step, row.first_block + index);
    uint8_t* exp_avg_sq_0_codes = row.exp_avg_sq_0_codes + index * 48;
    stq::BlockKey exp_avg_sq_0_key = stq::block_key(s.exp_avg_sq_0_key, step, row.first_block + index);
    stq::i32v getitem[stq::kPlanes];
    stq::i32v getitem_2[stq::kPlanes];
#pragma GCC unroll 8
    for (int p = 0; p < stq::kPlanes; ++p) {
      const stq::f32v exp_avg_0_new_abs = stq::abs(fma_1[j][p]);  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_mul = exp_avg_0_new_abs * exp_avg_0_new_select[j];  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_min = stq::min(exp_avg_0_new_mul, stq::all(1.0f));  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_add = exp_avg_0_new_min + 1.0f;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_mul_1 = exp_avg_0_new_min * 14.0f;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_div_1 = exp_avg_0_new_mul_1 / exp_avg_0_new_add;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_floor = stq::floor(exp_avg_0_new_div_1);  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_sub = exp_avg_0_new_div_1 - exp_avg_0_new_floor;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_sub_1 = 13.0f - exp_avg_0_new_floor;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_mul_2 = exp_avg_0_new_sub * exp_avg_0_new_sub_1;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_mul_3 = exp_avg_0_new_add * 1.1983726e+06f;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_mul_4 = exp_avg_0_new_mul_2 * exp_avg_0_new_mul_3;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_exp_avg_0_key = stq::random24(exp_avg_0_key);  // exp_avg_0_new
      const stq::i32v exp_avg_0_new_lt = exp_avg_0_new_exp_avg_0_key < exp_avg_0_new_mul_4;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_add_1 = exp_avg_0_new_floor + 1.0f;  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_select_1 = stq::select(exp_avg_0_new_lt, exp_avg_0_new_add_1, exp_avg_0_new_floor);  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_copysign = stq::copysign(exp_avg_0_new_select_1, fma_1[j][p]);  // exp_avg_0_new
      const stq::f32v exp_avg_0_new_add_2 = exp_avg_0_new_copysign + 7.0f;  // exp_avg_0_new
      const stq::i32v exp_avg_0_new_to_int = stq::to_int(exp_avg_0_new_add_2);  // exp_avg_0_new
      getitem[p] = stq::select((tail ? stq::valid(p, count) : stq::all(true)), exp_avg_0_new_to_int, stq::all(0));  // exp_avg_0_new
      const stq::f32v exp_avg_sq_0_new_fma_2 = stq::fma(exp_avg_sq_0_new_to_float_1[j][p], stq::all(exp_avg_sq_0_new_div_1[j]), stq::all(exp_avg_sq_0_new_fma_1[j]));  // exp_avg_sq_0_new
      const stq::f32v exp_avg_sq_0_new_max_3 = stq::max(exp_avg_sq_0_new_fma_2, stq::all(exp_avg_sq_0_new_sub_2[j]));  // exp_avg_sq_0_new
      const stq::i32v exp_avg_sq_0_new_exp_avg_sq_0_key = stq::random(exp_avg_sq_0_key);  // exp_avg_sq_0_new
      const stq::f32v exp_avg_sq_0_new_to_float_2 = stq::to_float(exp_avg_sq_0_new_exp_avg_sq_0_key);  // exp_avg_sq_0_new
      const stq::f32v exp_avg_sq_0_new_fma_3 = stq::fma(exp_avg_sq_0_new_to_float_2, stq::all(exp_avg_sq_0_new_mul_9[j]), stq::all(2.3282887e-10f));  // exp_avg_sq_0_new
      const stq::f32v exp_avg_sq_0_new_fma_4 = stq::fma(exp_avg_sq_0_new_to_float_2, exp_avg_sq_0_new_fma_3, exp_avg_sq_0_new_max_3);  // exp_avg_sq_0_new
      const stq::i32v exp_avg_sq_0_new_to_int_1 = stq::to_int(exp_avg_sq_0_new_fma_4);  // exp_avg_sq_0_new
      getitem_2[p] = stq::select((tail ? stq::valid(p, count) : stq::all(true)), exp_avg_sq_0_new_to_int_1, stq::all(0));  // exp_avg_sq_0_new
    }
    stq::pack<4>(exp_avg_0_codes, getitem);  // -> exp_avg_0_codes
    row.exp_avg_0_scales[index] = static_cast<uint16_t>(exp_avg_0_new_int_select_3[j]);  // -> exp_avg_0_scales
    stq::pack<3>(exp_avg_sq_0_codes, getitem_2);  // -> exp_avg_sq_0_codes
    row.exp_avg_sq_0_scales[index] = static_cast<uint16_t>(exp_avg_sq_0_new_int_select_5[j]);  // -> exp_avg_sq_0_scales
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

