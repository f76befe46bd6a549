// sgd_measure_momentum_buffer_softsign4: momentum_buffer_0 softsign4; 8.52 bytes per element
#include "stq_kernel.h"

struct Row {
  float* param_0;
  float* grad_0;
  uint8_t* momentum_buffer_0_codes;
  uint16_t* momentum_buffer_0_scales;
  double* sums;
  int64_t numel;
  int64_t first_block;
  int64_t stride;  // every stride-th block of the whole tensor is sampled
  int64_t offset;  // from this one on
};

struct Scalars {
  float _to_copy_20;
  float mul_59;
};

static void scalars(const Row& row, uint64_t step, Scalars& s) {
  const double _to_copy_8 = 1.0 * 0.9;  // mul_5
  const double _to_copy_17 = _to_copy_8 * 0.01;  // mul_8
  const double _to_copy_20 = _to_copy_17 * -1.0;  // mul_11
  const double mul_59 = 0.005524271728019903 * 0.005524271728019903;  // settled_error_6
  s._to_copy_20 = static_cast<float>(_to_copy_20);
  s.mul_59 = static_cast<float>(mul_59);
}

template <bool tail>
STQ_INLINE void tile(const Row& row, const Scalars& s, uint64_t step, int64_t first,
                     int blocks, int count, int64_t stride, double* totals) {
  constexpr int size = tail ? 1 : stq::kTile;
  float param_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(param_0_tail, row.param_0 + first * stq::kBlock, count * 4);
  float grad_0_tail[tail ? stq::kBlock : 1] = {};
  if constexpr (tail) std::memcpy(grad_0_tail, row.grad_0 + first * stq::kBlock, count * 4);
  stq::f32v momentum_buffer_0_table[size];
  stq::f32v mul_1_table[size];
  stq::f32v abs[size][stq::kPlanes];
  stq::f32v abs_1[size][stq::kPlanes];
  const stq::i32b momentum_buffer_0_word = stq::load_words(row.momentum_buffer_0_scales + first, blocks, stride);  // momentum_buffer_0
  const stq::i32b momentum_buffer_0_shift_left = momentum_buffer_0_word << 16;  // momentum_buffer_0
  const stq::f32b momentum_buffer_0_from_bits = stq::from_bits(momentum_buffer_0_shift_left);  // momentum_buffer_0
  stq::i32v absmax_tile[stq::kTile]{};
  stq::f32v block_sum_tile[stq::kTile]{};
  stq::f32v block_sum_1_tile[stq::kTile]{};
  stq::f32v block_sum_2_tile[stq::kTile]{};
  stq::f32v block_sum_9_tile[stq::kTile]{};
  stq::f32v block_sum_15_tile[stq::kTile]{};
  stq::f32v block_sum_18_tile[stq::kTile]{};
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j * stride;
    const stq::i32v momentum_buffer_0_int_sub_table = stq::iota() - 7;  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_to_float_table = stq::to_float(momentum_buffer_0_int_sub_table);  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_abs_table = stq::abs(momentum_buffer_0_to_float_table);  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_sub_table = 14.0f - momentum_buffer_0_abs_table;  // momentum_buffer_0
    const stq::f32v momentum_buffer_0_div_table = momentum_buffer_0_to_float_table / momentum_buffer_0_sub_table;  // momentum_buffer_0
    momentum_buffer_0_table[j] = momentum_buffer_0_div_table * momentum_buffer_0_from_bits[j];  // momentum_buffer_0
    mul_1_table[j] = momentum_buffer_0_table[j] * 0.9f;  // mul
  }
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j * stride;
    float* param_0 = tail ? param_0_tail : row.param_0 + index * stq::kBlock;
    float* grad_0 = tail ? grad_0_tail : row.grad_0 + index * stq::kBlock;
    uint8_t* momentum_buffer_0_codes = row.momentum_buffer_0_codes + index * 64;
    const stq::Nibbles momentum_buffer_0_codes_nibbles = stq::nibbles<4>(momentum_buffer_0_codes);
    stq::i32v absmax_lanes{};
    stq::f32v block_sum_lanes{};
    stq::f32v block_sum_1_lanes{};
    stq::f32v block_sum_2_lanes{};
    stq::f32v block_sum_9_lanes{};
    stq::f32v block_sum_15_lanes{};
    stq::f32v block_sum_18_lanes{};
#pragma GCC unroll 1
    for (int p = 0; p < stq::kPlanes; ++p) {
      const stq::f32v param_0_1 = stq::load(param_0 + p * stq::kLanes);  // param_0  param
      const stq::f32v grad_0_1 = stq::load(grad_0 + p * stq::kLanes);  // grad_0  grad
      const stq::i32v momentum_buffer_0_code = stq::index(momentum_buffer_0_codes_nibbles, p);  // momentum_buffer_0
      const stq::f32v momentum_buffer_0 = stq::lookup(momentum_buffer_0_table[j], momentum_buffer_0_code);  // momentum_buffer_0
      const stq::f32v mul_1 = stq::lookup(mul_1_table[j], momentum_buffer_0_code);  // mul
      const stq::f32v add_1 = mul_1 + grad_0_1;  // add
      const stq::f32v mul_1_1 = add_1 * 0.01f;  // mul_1
      const stq::f32v sub_1 = param_0_1 - mul_1_1;  // sub
      const stq::f32v sub_1_1 = sub_1 - param_0_1;  // sub_1
      const stq::f32v mul_2_1 = sub_1_1 * sub_1_1;  // mul_2
      const stq::f32v mul_3_1 = param_0_1 * param_0_1;  // mul_3
      const stq::i32v bits_of = stq::bits_of(add_1);  // settled_error
      const stq::i32v int_and = bits_of & 2147483647;  // settled_error
      const stq::i32v int_select = stq::select((tail ? stq::valid(p, count) : stq::all(true)), int_and, stq::all(0));  // settled_error
      absmax_lanes = stq::max(absmax_lanes, int_select);  // settled_error
      abs[j][p] = stq::abs(add_1);  // settled_error
      const stq::f32v sub_3 = add_1 - momentum_buffer_0;  // settled_error
      abs_1[j][p] = stq::abs(sub_3);  // settled_error
      const stq::f32v max = stq::max(abs[j][p], stq::all(7.523164e-37f));  // settled_error_6
      const stq::f32v div_7 = abs_1[j][p] / max;  // settled_error_6
      const stq::f32v min_2 = stq::min(div_7, stq::all(16.0f));  // settled_error_6
      const stq::f32v div_8 = min_2 / 0.0055242716f;  // settled_error_6
      const stq::f32v fraction_6 = stq::fraction(div_8);  // settled_error_6
      const stq::f32v sub_10 = 1.0f - fraction_6;  // settled_error_6
      const stq::f32v mul_60 = fraction_6 * sub_10;  // settled_error_6
      const stq::f32v mul_61 = s.mul_59 * mul_60;  // settled_error_6
      const stq::f32v mul_62 = mul_61 * 3.131579f;  // settled_error_6
      const stq::f32v sqrt_6 = stq::sqrt(mul_62);  // settled_error_6
      const stq::f32v settled_error_6 = abs[j][p] * sqrt_6;  // settled_error_6
      const stq::f32v mul_25_1 = s._to_copy_20 * settled_error_6;  // mul_25
      const stq::f32v mul_26_1 = mul_25_1 * mul_25_1;  // mul_26
      const stq::i32v eq = add_1 == 0.0f;  // factors
      const stq::f32v select_1 = stq::select(eq, stq::all(1.0f), stq::all(0.0f));  // factors
      const stq::f32v mul_72 = add_1 * grad_0_1;  // factors
      const stq::i32v gt_1 = mul_72 > 0.0f;  // factors
      const stq::f32v select_3 = stq::select(gt_1, stq::all(1.0f), stq::all(0.0f));  // factors
      const stq::f32v select_4 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), stq::all(1.0f), stq::all(0.0f));  // sums_1
      block_sum_lanes = p == 0 ? select_4 : block_sum_lanes + select_4;  // sums_1
      const stq::f32v abs_2 = stq::abs(mul_2_1);  // sums_1
      const stq::i32v lt_1 = abs_2 < 1.329228e+36f;  // sums_1
      const stq::f32v select_5 = stq::select(lt_1, mul_2_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_6 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_5, stq::all(0.0f));  // sums_1
      block_sum_1_lanes = p == 0 ? select_6 : block_sum_1_lanes + select_6;  // sums_1
      const stq::f32v abs_3 = stq::abs(mul_3_1);  // sums_1
      const stq::i32v lt_2 = abs_3 < 1.329228e+36f;  // sums_1
      const stq::f32v select_7 = stq::select(lt_2, mul_3_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_8 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_7, stq::all(0.0f));  // sums_1
      block_sum_2_lanes = p == 0 ? select_8 : block_sum_2_lanes + select_8;  // sums_1
      const stq::f32v abs_10 = stq::abs(mul_26_1);  // sums_1
      const stq::i32v lt_9 = abs_10 < 1.329228e+36f;  // sums_1
      const stq::f32v select_21 = stq::select(lt_9, mul_26_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_22 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_21, stq::all(0.0f));  // sums_1
      block_sum_9_lanes = p == 0 ? select_22 : block_sum_9_lanes + select_22;  // sums_1
      const stq::f32v abs_16 = stq::abs(select_1);  // sums_1
      const stq::i32v lt_15 = abs_16 < 1.329228e+36f;  // sums_1
      const stq::f32v select_33 = stq::select(lt_15, select_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_34 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_33, stq::all(0.0f));  // sums_1
      block_sum_15_lanes = p == 0 ? select_34 : block_sum_15_lanes + select_34;  // sums_1
      const stq::f32v abs_19 = stq::abs(select_3);  // sums_1
      const stq::i32v lt_18 = abs_19 < 1.329228e+36f;  // sums_1
      const stq::f32v select_39 = stq::select(lt_18, select_3, stq::all(0.0f));  // sums_1
      const stq::f32v select_40 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_39, stq::all(0.0f));  // sums_1
      block_sum_18_lanes = p == 0 ? select_40 : block_sum_18_lanes + select_40;  // sums_1
    }
    absmax_tile[j] = absmax_lanes;  // settled_error
    block_sum_tile[j] = block_sum_lanes;  // sums_1
    block_sum_1_tile[j] = block_sum_1_lanes;  // sums_1
    block_sum_2_tile[j] = block_sum_2_lanes;  // sums_1
    block_sum_9_tile[j] = block_sum_9_lanes;  // sums_1
    block_sum_15_tile[j] = block_sum_15_lanes;  // sums_1
    block_sum_18_tile[j] = block_sum_18_lanes;  // sums_1
  }
  const stq::i32b absmax = stq::max_lanes(absmax_tile);  // settled_error
  const stq::f32b block_sum = stq::sum_lanes(block_sum_tile);  // sums_1
  const stq::f32b block_sum_1 = stq::sum_lanes(block_sum_1_tile);  // sums_1
  const stq::f32b block_sum_2 = stq::sum_lanes(block_sum_2_tile);  // sums_1
  const stq::f32b block_sum_9 = stq::sum_lanes(block_sum_9_tile);  // sums_1
  const stq::f32b block_sum_15 = stq::sum_lanes(block_sum_15_tile);  // sums_1
  const stq::f32b block_sum_18 = stq::sum_lanes(block_sum_18_tile);  // sums_1
  const stq::i32b int_add = absmax + 65535;  // settled_error
  const stq::i32b shift_right = int_add >> 16;  // settled_error
  const stq::i32b int_max = stq::max(shift_right, stq::each(128));  // settled_error
  const stq::i32b int_min = stq::min(int_max, stq::each(32639));  // settled_error
  const stq::i32b int_eq = absmax == 0;  // settled_error
  const stq::i32b int_select_1 = stq::select(int_eq, stq::each(0), int_min);  // settled_error
  const stq::i32b int_lt = 2139095040 < absmax;  // settled_error
  const stq::i32b int_select_2 = stq::select(int_lt, stq::each(32704), stq::each(32640));  // settled_error
  const stq::i32b int_lt_1 = absmax < 2139095040;  // settled_error
  const stq::i32b int_select_3 = stq::select(int_lt_1, int_select_1, int_select_2);  // settled_error
  const stq::i32b shift_left = int_select_3 << 16;  // settled_error
  const stq::f32b from_bits = stq::from_bits(shift_left);  // settled_error
  const stq::i32b gt = from_bits > 0.0f;  // settled_error
  const stq::f32b div = 1.0f / from_bits;  // settled_error
  const stq::f32b select = stq::select(gt, div, stq::each(0.0f));  // settled_error
  const stq::i32b bits_of_2 = stq::bits_of(from_bits);  // factors
  const stq::i32b int_sub_1 = bits_of_2 - 1065353216;  // factors
  const stq::f32b to_float_1 = stq::to_float(int_sub_1);  // factors
  const stq::f32b mul_68 = to_float_1 * 1.1920929e-07f;  // factors
  const stq::i32b int_and_2 = bits_of_2 & 8388607;  // factors
  const stq::i32b int_or_1 = int_and_2 | 1065353216;  // factors
  const stq::f32b from_bits_2 = stq::from_bits(int_or_1);  // factors
  const stq::f32b sub_12 = from_bits_2 - 1.5f;  // factors
  const stq::f32b fma_6 = stq::fma(sub_12, stq::each(-0.02584127f), stq::each(0.044273555f));  // factors
  const stq::f32b fma_7 = stq::fma(fma_6, sub_12, stq::each(-0.07677639f));  // factors
  const stq::f32b fma_8 = stq::fma(fma_7, sub_12, stq::each(0.15269805f));  // factors
  const stq::f32b fma_9 = stq::fma(fma_8, sub_12, stq::each(-0.33985254f));  // factors
  const stq::f32b fma_10 = stq::fma(sub_12, sub_12, stq::each(-0.25f));  // factors
  const stq::f32b fma_11 = stq::fma(fma_9, fma_10, mul_68);  // factors
  const stq::f32b max_2 = stq::max(fma_11, stq::each(-126.0f));  // factors
  const stq::f32b getitem_10 = max_2 * max_2;  // factors
  const stq::f32b abs_20 = stq::abs(max_2);  // sums_1
  const stq::i32b lt_19 = abs_20 < 1.329228e+36f;  // sums_1
  const stq::f32b select_41 = stq::select(lt_19, max_2, stq::each(0.0f));  // sums_1
  const stq::f32b abs_21 = stq::abs(getitem_10);  // sums_1
  const stq::i32b lt_20 = abs_21 < 1.329228e+36f;  // sums_1
  const stq::f32b select_43 = stq::select(lt_20, getitem_10, stq::each(0.0f));  // sums_1
  stq::f32v block_sum_3_tile[stq::kTile]{};
  stq::f32v block_sum_4_tile[stq::kTile]{};
  stq::f32v block_sum_5_tile[stq::kTile]{};
  stq::f32v block_sum_6_tile[stq::kTile]{};
  stq::f32v block_sum_7_tile[stq::kTile]{};
  stq::f32v block_sum_8_tile[stq::kTile]{};
  stq::f32v block_sum_10_tile[stq::kTile]{};
  stq::f32v block_sum_11_tile[stq::kTile]{};
  stq::f32v block_sum_12_tile[stq::kTile]{};
  stq::f32v block_sum_13_tile[stq::kTile]{};
  stq::f32v block_sum_14_tile[stq::kTile]{};
  stq::f32v block_sum_16_tile[stq::kTile]{};
  stq::f32v block_sum_17_tile[stq::kTile]{};
  stq::f32v block_sum_19_tile[stq::kTile]{};
  stq::f32v block_sum_20_tile[stq::kTile]{};
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j * stride;
    stq::f32v block_sum_3_lanes{};
    stq::f32v block_sum_4_lanes{};
    stq::f32v block_sum_5_lanes{};
    stq::f32v block_sum_6_lanes{};
    stq::f32v block_sum_7_lanes{};
    stq::f32v block_sum_8_lanes{};
    stq::f32v block_sum_10_lanes{};
    stq::f32v block_sum_11_lanes{};
    stq::f32v block_sum_12_lanes{};
    stq::f32v block_sum_13_lanes{};
    stq::f32v block_sum_14_lanes{};
    stq::f32v block_sum_16_lanes{};
    stq::f32v block_sum_17_lanes{};
    stq::f32v block_sum_19_lanes{};
    stq::f32v block_sum_20_lanes{};
#pragma GCC unroll 1
    for (int p = 0; p < stq::kPlanes; ++p) {
      const stq::f32v mul_8_1 = abs[j][p] * select[j];  // settled_error
      const stq::f32v min = stq::min(mul_8_1, stq::all(1.0f));  // settled_error
      const stq::f32v mul_9 = abs_1[j][p] * select[j];  // settled_error
      const stq::f32v min_1 = stq::min(mul_9, stq::all(16.0f));  // settled_error
      const stq::f32v add_2 = min + 1.0f;  // settled_error
      const stq::f32v mul_10 = add_2 * add_2;  // settled_error
      const stq::f32v mul_11_1 = mul_10 * 0.5f;  // settled_error
      const stq::f32v mul_12 = mul_11_1 * mul_11_1;  // settled_error
      const stq::f32v div_1 = min_1 / mul_11_1;  // settled_error
      const stq::f32v fraction = stq::fraction(div_1);  // settled_error
      const stq::f32v sub_4 = 1.0f - fraction;  // settled_error
      const stq::f32v mul_13 = fraction * sub_4;  // settled_error
      const stq::f32v mul_14 = mul_12 * mul_13;  // settled_error
      const stq::f32v mul_15 = mul_14 * 3.131579f;  // settled_error
      const stq::f32v sqrt = stq::sqrt(mul_15);  // settled_error
      const stq::f32v settled_error = from_bits[j] * sqrt;  // settled_error
      const stq::f32v mul_13_1 = s._to_copy_20 * settled_error;  // mul_13
      const stq::f32v mul_14_1 = mul_13_1 * mul_13_1;  // mul_14
      const stq::f32v mul_19 = mul_10 * 0.16666667f;  // settled_error_1
      const stq::f32v mul_20 = mul_19 * mul_19;  // settled_error_1
      const stq::f32v div_2 = min_1 / mul_19;  // settled_error_1
      const stq::f32v fraction_1 = stq::fraction(div_2);  // settled_error_1
      const stq::f32v sub_5 = 1.0f - fraction_1;  // settled_error_1
      const stq::f32v mul_21 = fraction_1 * sub_5;  // settled_error_1
      const stq::f32v mul_22 = mul_20 * mul_21;  // settled_error_1
      const stq::f32v mul_23 = mul_22 * 3.131579f;  // settled_error_1
      const stq::f32v sqrt_1 = stq::sqrt(mul_23);  // settled_error_1
      const stq::f32v settled_error_1 = from_bits[j] * sqrt_1;  // settled_error_1
      const stq::f32v mul_15_1 = s._to_copy_20 * settled_error_1;  // mul_15
      const stq::f32v mul_16_1 = mul_15_1 * mul_15_1;  // mul_16
      const stq::f32v mul_27 = mul_10 * 0.071428575f;  // settled_error_2
      const stq::f32v mul_28 = mul_27 * mul_27;  // settled_error_2
      const stq::f32v div_3 = min_1 / mul_27;  // settled_error_2
      const stq::f32v fraction_2 = stq::fraction(div_3);  // settled_error_2
      const stq::f32v sub_6 = 1.0f - fraction_2;  // settled_error_2
      const stq::f32v mul_29 = fraction_2 * sub_6;  // settled_error_2
      const stq::f32v mul_30 = mul_28 * mul_29;  // settled_error_2
      const stq::f32v mul_31 = mul_30 * 3.131579f;  // settled_error_2
      const stq::f32v sqrt_2 = stq::sqrt(mul_31);  // settled_error_2
      const stq::f32v settled_error_2 = from_bits[j] * sqrt_2;  // settled_error_2
      const stq::f32v mul_17_1 = s._to_copy_20 * settled_error_2;  // mul_17
      const stq::f32v mul_18_1 = mul_17_1 * mul_17_1;  // mul_18
      const stq::f32v mul_35 = mul_10 * 0.033333335f;  // settled_error_3
      const stq::f32v mul_36 = mul_35 * mul_35;  // settled_error_3
      const stq::f32v div_4 = min_1 / mul_35;  // settled_error_3
      const stq::f32v fraction_3 = stq::fraction(div_4);  // settled_error_3
      const stq::f32v sub_7 = 1.0f - fraction_3;  // settled_error_3
      const stq::f32v mul_37 = fraction_3 * sub_7;  // settled_error_3
      const stq::f32v mul_38 = mul_36 * mul_37;  // settled_error_3
      const stq::f32v mul_39 = mul_38 * 3.131579f;  // settled_error_3
      const stq::f32v sqrt_3 = stq::sqrt(mul_39);  // settled_error_3
      const stq::f32v settled_error_3 = from_bits[j] * sqrt_3;  // settled_error_3
      const stq::f32v mul_19_1 = s._to_copy_20 * settled_error_3;  // mul_19
      const stq::f32v mul_20_1 = mul_19_1 * mul_19_1;  // mul_20
      const stq::f32v mul_43 = mul_10 * 0.016129032f;  // settled_error_4
      const stq::f32v mul_44 = mul_43 * mul_43;  // settled_error_4
      const stq::f32v div_5 = min_1 / mul_43;  // settled_error_4
      const stq::f32v fraction_4 = stq::fraction(div_5);  // settled_error_4
      const stq::f32v sub_8 = 1.0f - fraction_4;  // settled_error_4
      const stq::f32v mul_45 = fraction_4 * sub_8;  // settled_error_4
      const stq::f32v mul_46 = mul_44 * mul_45;  // settled_error_4
      const stq::f32v mul_47 = mul_46 * 3.131579f;  // settled_error_4
      const stq::f32v sqrt_4 = stq::sqrt(mul_47);  // settled_error_4
      const stq::f32v settled_error_4 = from_bits[j] * sqrt_4;  // settled_error_4
      const stq::f32v mul_21_1 = s._to_copy_20 * settled_error_4;  // mul_21
      const stq::f32v mul_22_1 = mul_21_1 * mul_21_1;  // mul_22
      const stq::f32v mul_51 = mul_10 * 0.003937008f;  // settled_error_5
      const stq::f32v mul_52 = mul_51 * mul_51;  // settled_error_5
      const stq::f32v div_6 = min_1 / mul_51;  // settled_error_5
      const stq::f32v fraction_5 = stq::fraction(div_6);  // settled_error_5
      const stq::f32v sub_9 = 1.0f - fraction_5;  // settled_error_5
      const stq::f32v mul_53 = fraction_5 * sub_9;  // settled_error_5
      const stq::f32v mul_54 = mul_52 * mul_53;  // settled_error_5
      const stq::f32v mul_55 = mul_54 * 3.131579f;  // settled_error_5
      const stq::f32v sqrt_5 = stq::sqrt(mul_55);  // settled_error_5
      const stq::f32v settled_error_5 = from_bits[j] * sqrt_5;  // settled_error_5
      const stq::f32v mul_23_1 = s._to_copy_20 * settled_error_5;  // mul_23
      const stq::f32v mul_24_1 = mul_23_1 * mul_23_1;  // mul_24
      const stq::f32v mul_66 = min * min;  // factors
      const stq::i32v bits_of_1 = stq::bits_of(min);  // factors
      const stq::i32v int_sub = bits_of_1 - 1065353216;  // factors
      const stq::f32v to_float = stq::to_float(int_sub);  // factors
      const stq::f32v mul_67 = to_float * 1.1920929e-07f;  // factors
      const stq::i32v int_and_1 = bits_of_1 & 8388607;  // factors
      const stq::i32v int_or = int_and_1 | 1065353216;  // factors
      const stq::f32v from_bits_1 = stq::from_bits(int_or);  // factors
      const stq::f32v sub_11 = from_bits_1 - 1.5f;  // factors
      const stq::f32v fma = stq::fma(sub_11, stq::all(-0.02584127f), stq::all(0.044273555f));  // factors
      const stq::f32v fma_1 = stq::fma(fma, sub_11, stq::all(-0.07677639f));  // factors
      const stq::f32v fma_2 = stq::fma(fma_1, sub_11, stq::all(0.15269805f));  // factors
      const stq::f32v fma_3 = stq::fma(fma_2, sub_11, stq::all(-0.33985254f));  // factors
      const stq::f32v fma_4 = stq::fma(sub_11, sub_11, stq::all(-0.25f));  // factors
      const stq::f32v fma_5 = stq::fma(fma_3, fma_4, mul_67);  // factors
      const stq::f32v max_1 = stq::max(fma_5, stq::all(-24.0f));  // factors
      const stq::f32v mul_69 = mul_10 * 0.035714287f;  // factors
      const stq::f32v mul_70 = mul_66 * mul_66;  // factors
      const stq::f32v mul_71 = max_1 * max_1;  // factors
      const stq::i32v lt = min_1 < mul_69;  // factors
      const stq::f32v select_2 = stq::select(lt, stq::all(1.0f), stq::all(0.0f));  // factors
      const stq::f32v abs_4 = stq::abs(mul_14_1);  // sums_1
      const stq::i32v lt_3 = abs_4 < 1.329228e+36f;  // sums_1
      const stq::f32v select_9 = stq::select(lt_3, mul_14_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_10 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_9, stq::all(0.0f));  // sums_1
      block_sum_3_lanes = p == 0 ? select_10 : block_sum_3_lanes + select_10;  // sums_1
      const stq::f32v abs_5 = stq::abs(mul_16_1);  // sums_1
      const stq::i32v lt_4 = abs_5 < 1.329228e+36f;  // sums_1
      const stq::f32v select_11 = stq::select(lt_4, mul_16_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_12 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_11, stq::all(0.0f));  // sums_1
      block_sum_4_lanes = p == 0 ? select_12 : block_sum_4_lanes + select_12;  // sums_1
      const stq::f32v abs_6 = stq::abs(mul_18_1);  // sums_1
      const stq::i32v lt_5 = abs_6 < 1.329228e+36f;  // sums_1
      const stq::f32v select_13 = stq::select(lt_5, mul_18_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_14 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_13, stq::all(0.0f));  // sums_1
      block_sum_5_lanes = p == 0 ? select_14 : block_sum_5_lanes + select_14;  // sums_1
      const stq::f32v abs_7 = stq::abs(mul_20_1);  // sums_1
      const stq::i32v lt_6 = abs_7 < 1.329228e+36f;  // sums_1
      const stq::f32v select_15 = stq::select(lt_6, mul_20_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_16 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_15, stq::all(0.0f));  // sums_1
      block_sum_6_lanes = p == 0 ? select_16 : block_sum_6_lanes + select_16;  // sums_1
      const stq::f32v abs_8 = stq::abs(mul_22_1);  // sums_1
      const stq::i32v lt_7 = abs_8 < 1.329228e+36f;  // sums_1
      const stq::f32v select_17 = stq::select(lt_7, mul_22_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_18 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_17, stq::all(0.0f));  // sums_1
      block_sum_7_lanes = p == 0 ? select_18 : block_sum_7_lanes + select_18;  // sums_1
      const stq::f32v abs_9 = stq::abs(mul_24_1);  // sums_1
      const stq::i32v lt_8 = abs_9 < 1.329228e+36f;  // sums_1
      const stq::f32v select_19 = stq::select(lt_8, mul_24_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_20 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_19, stq::all(0.0f));  // sums_1
      block_sum_8_lanes = p == 0 ? select_20 : block_sum_8_lanes + select_20;  // sums_1
      const stq::f32v abs_11 = stq::abs(min);  // sums_1
      const stq::i32v lt_10 = abs_11 < 1.329228e+36f;  // sums_1
      const stq::f32v select_23 = stq::select(lt_10, min, stq::all(0.0f));  // sums_1
      const stq::f32v select_24 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_23, stq::all(0.0f));  // sums_1
      block_sum_10_lanes = p == 0 ? select_24 : block_sum_10_lanes + select_24;  // sums_1
      const stq::f32v abs_12 = stq::abs(mul_66);  // sums_1
      const stq::i32v lt_11 = abs_12 < 1.329228e+36f;  // sums_1
      const stq::f32v select_25 = stq::select(lt_11, mul_66, stq::all(0.0f));  // sums_1
      const stq::f32v select_26 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_25, stq::all(0.0f));  // sums_1
      block_sum_11_lanes = p == 0 ? select_26 : block_sum_11_lanes + select_26;  // sums_1
      const stq::f32v abs_13 = stq::abs(mul_70);  // sums_1
      const stq::i32v lt_12 = abs_13 < 1.329228e+36f;  // sums_1
      const stq::f32v select_27 = stq::select(lt_12, mul_70, stq::all(0.0f));  // sums_1
      const stq::f32v select_28 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_27, stq::all(0.0f));  // sums_1
      block_sum_12_lanes = p == 0 ? select_28 : block_sum_12_lanes + select_28;  // sums_1
      const stq::f32v abs_14 = stq::abs(max_1);  // sums_1
      const stq::i32v lt_13 = abs_14 < 1.329228e+36f;  // sums_1
      const stq::f32v select_29 = stq::select(lt_13, max_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_30 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_29, stq::all(0.0f));  // sums_1
      block_sum_13_lanes = p == 0 ? select_30 : block_sum_13_lanes + select_30;  // sums_1
      const stq::f32v abs_15 = stq::abs(mul_71);  // sums_1
      const stq::i32v lt_14 = abs_15 < 1.329228e+36f;  // sums_1
      const stq::f32v select_31 = stq::select(lt_14, mul_71, stq::all(0.0f));  // sums_1
      const stq::f32v select_32 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_31, stq::all(0.0f));  // sums_1
      block_sum_14_lanes = p == 0 ? select_32 : block_sum_14_lanes + select_32;  // sums_1
      const stq::f32v abs_17 = stq::abs(min_1);  // sums_1
      const stq::i32v lt_16 = abs_17 < 1.329228e+36f;  // sums_1
      const stq::f32v select_35 = stq::select(lt_16, min_1, stq::all(0.0f));  // sums_1
      const stq::f32v select_36 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_35, stq::all(0.0f));  // sums_1
      block_sum_16_lanes = p == 0 ? select_36 : block_sum_16_lanes + select_36;  // sums_1
      const stq::f32v abs_18 = stq::abs(select_2);  // sums_1
      const stq::i32v lt_17 = abs_18 < 1.329228e+36f;  // sums_1
      const stq::f32v select_37 = stq::select(lt_17, select_2, stq::all(0.0f));  // sums_1
      const stq::f32v select_38 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), select_37, stq::all(0.0f));  // sums_1
      block_sum_17_lanes = p == 0 ? select_38 : block_sum_17_lanes + select_38;  // sums_1
      const stq::f32v select_42 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), stq::all(select_41[j]), stq::all(0.0f));  // sums_1
      block_sum_19_lanes = p == 0 ? select_42 : block_sum_19_lanes + select_42;  // sums_1
      const stq::f32v select_44 = stq::select((tail ? stq::valid(p, count) : stq::all(true)), stq::all(select_43[j]), stq::all(0.0f));  // sums_1
      block_sum_20_lanes = p == 0 ? select_44 : block_sum_20_lanes + select_44;  // sums_1
    }
    block_sum_3_tile[j] = block_sum_3_lanes;  // sums_1
    block_sum_4_tile[j] = block_sum_4_lanes;  // sums_1
    block_sum_5_tile[j] = block_sum_5_lanes;  // sums_1
    block_sum_6_tile[j] = block_sum_6_lanes;  // sums_1
    block_sum_7_tile[j] = block_sum_7_lanes;  // sums_1
    block_sum_8_tile[j] = block_sum_8_lanes;  // sums_1
    block_sum_10_tile[j] = block_sum_10_lanes;  // sums_1
    block_sum_11_tile[j] = block_sum_11_lanes;  // sums_1
    block_sum_12_tile[j] = block_sum_12_lanes;  // sums_1
    block_sum_13_tile[j] = block_sum_13_lanes;  // sums_1
    block_sum_14_tile[j] = block_sum_14_lanes;  // sums_1
    block_sum_16_tile[j] = block_sum_16_lanes;  // sums_1
    block_sum_17_tile[j] = block_sum_17_lanes;  // sums_1
    block_sum_19_tile[j] = block_sum_19_lanes;  // sums_1
    block_sum_20_tile[j] = block_sum_20_lanes;  // sums_1
    totals[0] += block_sum[j];  // -> sums
    totals[1] += block_sum_1[j];  // -> sums
    totals[2] += block_sum_2[j];  // -> sums
    totals[9] += block_sum_9[j];  // -> sums
    totals[15] += block_sum_15[j];  // -> sums
    totals[18] += block_sum_18[j];  // -> sums
  }
  const stq::f32b block_sum_3 = stq::sum_lanes(block_sum_3_tile);  // sums_1
  const stq::f32b block_sum_4 = stq::sum_lanes(block_sum_4_tile);  // sums_1
  const stq::f32b block_sum_5 = stq::sum_lanes(block_sum_5_tile);  // sums_1
  const stq::f32b block_sum_6 = stq::sum_lanes(block_sum_6_tile);  // sums_1
  const stq::f32b block_sum_7 = stq::sum_lanes(block_sum_7_tile);  // sums_1
  const stq::f32b block_sum_8 = stq::sum_lanes(block_sum_8_tile);  // sums_1
  const stq::f32b block_sum_10 = stq::sum_lanes(block_sum_10_tile);  // sums_1
  const stq::f32b block_sum_11 = stq::sum_lanes(block_sum_11_tile);  // sums_1
  const stq::f32b block_sum_12 = stq::sum_lanes(block_sum_12_tile);  // sums_1
  const stq::f32b block_sum_13 = stq::sum_lanes(block_sum_13_tile);  // sums_1
  const stq::f32b block_sum_14 = stq::sum_lanes(block_sum_14_tile);  // sums_1
  const stq::f32b block_sum_16 = stq::sum_lanes(block_sum_16_tile);  // sums_1
  const stq::f32b block_sum_17 = stq::sum_lanes(block_sum_17_tile);  // sums_1
  const stq::f32b block_sum_19 = stq::sum_lanes(block_sum_19_tile);  // sums_1
  const stq::f32b block_sum_20 = stq::sum_lanes(block_sum_20_tile);  // sums_1
  for (int j = 0; j < blocks; ++j) {
    const int64_t index = first + j * stride;
    totals[3] += block_sum_3[j];  // -> sums
    totals[4] += block_sum_4[j];  // -> sums
    totals[5] += block_sum_5[j];  // -> sums
    totals[6] += block_sum_6[j];  // -> sums
    totals[7] += block_sum_7[j];  // -> sums
    totals[8] += block_sum_8[j];  // -> sums
    totals[10] += block_sum_10[j];  // -> sums
    totals[11] += block_sum_11[j];  // -> sums
    totals[12] += block_sum_12[j];  // -> sums
    totals[13] += block_sum_13[j];  // -> sums
    totals[14] += block_sum_14[j];  // -> sums
    totals[16] += block_sum_16[j];  // -> sums
    totals[17] += block_sum_17[j];  // -> sums
    totals[19] += block_sum_19[j];  // -> sums
    totals[20] += block_sum_20[j];  // -> sums
  }
}

// Every stride-th block of every tensor, counted in the whole tensor; sums in float64.
extern "C" void run(const Row* rows, int64_t n_rows, uint64_t step, int threads, void* scratch) {
  constexpr int64_t slots = 21;
  double* totals = static_cast<double*>(scratch);  // one part a worker: no order of arrival
  int64_t* begin = reinterpret_cast<int64_t*>(totals + threads * n_rows * slots);
  int64_t* start = begin + n_rows;
  Scalars* s = reinterpret_cast<Scalars*>(start + n_rows + 1);
  start[0] = 0;
  for (int64_t r = 0; r < n_rows; ++r) {
    scalars(rows[r], step, s[r]);
    const int64_t stride = rows[r].stride, blocks = (rows[r].numel + stq::kBlock - 1) / stq::kBlock;
    begin[r] = ((rows[r].offset - rows[r].first_block) % stride + stride) % stride;
    start[r + 1] = start[r] + (blocks > begin[r] ? (blocks - 1 - begin[r]) / stride + 1 : 0);
  }
  const int64_t sampled = start[n_rows];
  const int workers = sampled < 512 ? 1 : threads;
  for (int64_t k = 0; k < workers * n_rows * slots; ++k) totals[k] = 0;
#pragma omp parallel for num_threads(workers) schedule(static) if (workers > 1)
  for (int w = 0; w < workers; ++w) {
    int64_t b = sampled * w / workers;
    const int64_t end = sampled * (w + 1) / workers;
    int64_t r = 0;
    while (b < end) {
      while (start[r + 1] <= b) ++r;
      const Row& row = rows[r];
      double* mine = totals + (w * n_rows + r) * slots;
      const int64_t stop = end < start[r + 1] ? end : start[r + 1];
      const int64_t last = row.numel / stq::kBlock;  // whole blocks of this tensor
      while (b < stop) {
        const int64_t first = begin[r] + (b - start[r]) * row.stride;
        if (first >= last) {
          const int count = static_cast<int>(row.numel - last * stq::kBlock);
          tile<true>(row, s[r], step, first, 1, count, row.stride, mine);
          ++b;
          continue;
        }
        int64_t left = (last - 1 - first) / row.stride + 1;
        if (left > stop - b) left = stop - b;
        const int blocks = left < stq::kTile ? static_cast<int>(left) : stq::kTile;
        tile<false>(row, s[r], step, first, blocks, stq::kBlock, row.stride, mine);
        b += blocks;
      }
    }
  }
  for (int64_t r = 0; r < n_rows; ++r)
    for (int64_t k = 0; k < slots; ++k) {
      double total = 0;
      for (int w = 0; w < workers; ++w) total += totals[(w * n_rows + r) * slots + k];
      rows[r].sums[k] = total;
    }
}

extern "C" int64_t scratch_bytes(int64_t n_rows, int threads) {
  static_assert(alignof(Scalars) <= 8);
  return n_rows * sizeof(Scalars) + (2 * n_rows + 1 + threads * n_rows * 21) * 8;
}

extern "C" int64_t row_bytes() { return sizeof(Row); }

