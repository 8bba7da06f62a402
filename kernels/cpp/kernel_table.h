// What an instruction set offers to the ops. Only data and declarations: this file is read under the flags of every instruction set.
#ifndef DTTA_KERNEL_TABLE_H
#define DTTA_KERNEL_TABLE_H

#include "dtta_ops.h"

namespace dtta {

struct Loss {
  const dtta_draws* draws;
  const void* prediction;
  float* loss;
  const float* upstream;
  void* gradient;
  int64_t prediction_stride, gradient_stride;
  int type;
  bool l1;
};

// out[d] = sum over i < count of weights[r * weight_stride] * rows[r][d], r = chosen[i] or i
struct WeightedSum {
  const float* weights;
  const void* rows;
  const int64_t* chosen;
  void* out;
  int64_t weight_stride, count, numbers;
  int type;
};

struct KernelTable {
  const char* name;
  // elements first .. last - 1 of a row; first is a multiple of kBlock
  void (*add_noise)(const dtta_draws& draws, void* x_t, int x_t_type, int64_t row, int64_t first, int64_t last);
  void (*denoising_loss)(const Loss& loss, int64_t row);
  void (*weighted_sum)(const WeightedSum& sum, int64_t first, int64_t last);
  float (*dot)(const void* left, const void* right, int type, int64_t first_left, int64_t first_right, int64_t numbers);
};

constexpr int64_t kBlock = 4096;  // elements of a task: whole tiles of every instruction set

extern const KernelTable kPortable, kAvx2, kAvx512;

}  // namespace dtta
#endif
