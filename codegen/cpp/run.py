"""The entry of a kernel: all tiles of all tensors, over threads. One text for all kernels.

A kernel allocates nothing: its caller brings ``scratch_bytes`` of memory, so that once the first
kernel of a step has begun, none can fail for want of it.
"""

from __future__ import annotations

STEP = """\
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
@tiles
      b = start[r] + stop;
    }
  }
}

extern "C" int64_t scratch_bytes(int64_t n_rows, int) {
  static_assert(alignof(Scalars) <= 8);
  return n_rows * sizeof(Scalars) + (n_rows + 1) * 8;
}

extern "C" int64_t row_bytes() { return sizeof(Row); }"""


TILES = """\
      for (; i < whole; i += stq::kTile) {
        const int64_t left = whole - i;
        const int blocks = left < stq::kTile ? static_cast<int>(left) : stq::kTile;
        tile<false>(row, scalar, step, i, blocks, stq::kBlock);
      }
      if (stop > last) {
        const int count = static_cast<int>(row.numel - last * stq::kBlock);
        tile<true>(row, scalar, step, last, 1, count);
      }"""

HELD_TILES = """\
      Held pair[2];
      const Held* before = nullptr;  // the tile whose last phase is still to come
      for (int at = 0; i < whole; i += stq::kTile, at ^= 1) {
        const int64_t left = whole - i;
        const int blocks = left < stq::kTile ? static_cast<int>(left) : stq::kTile;
        tile<false>(row, scalar, step, i, blocks, stq::kBlock, pair[at], before);
        before = &pair[at];
      }
      if (before != nullptr) finish<false>(row, scalar, step, *before, stq::kBlock);
      if (stop > last) {
        const int count = static_cast<int>(row.numel - last * stq::kBlock);
        tile<true>(row, scalar, step, last, 1, count, pair[0], nullptr);
        finish<true>(row, scalar, step, pair[0], count);
      }"""


MEASURE = """\
// Every stride-th block of every tensor, counted in the whole tensor; sums in float64.
extern "C" void run(const Row* rows, int64_t n_rows, uint64_t step, int threads, void* scratch) {
  constexpr int64_t slots = @slots;
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
      rows[r].@sums[k] = total;
    }
}

extern "C" int64_t scratch_bytes(int64_t n_rows, int threads) {
  static_assert(alignof(Scalars) <= 8);
  return n_rows * sizeof(Scalars) + (2 * n_rows + 1 + threads * n_rows * @slots) * 8;
}

extern "C" int64_t row_bytes() { return sizeof(Row); }"""
