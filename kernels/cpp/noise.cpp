// add_noise and denoising_loss behind the C ABI: everything is checked before anything is written.
#include "dispatch.h"
#include "parallel.h"

namespace {

constexpr int64_t kWords = int64_t{1} << 32;

int check(const dtta_draws* draws) {
  if (draws == nullptr || !draws->x0 || !draws->table || !draws->timesteps || !draws->image_ids) return DTTA_BAD_ARGUMENT;
  if (!dtta::known_type(draws->x0_type) || (draws->noise && !dtta::known_type(draws->noise_type))) return DTTA_BAD_ARGUMENT;
  if (draws->images < 1 || draws->pairs < 1 || draws->elements < 1 || draws->table_rows < 1) return DTTA_BAD_ARGUMENT;
  if (draws->elements > 4 * kWords || draws->pairs >= kWords || draws->images > INT64_MAX / draws->pairs) return DTTA_BAD_ARGUMENT;
  if (draws->images * draws->pairs > INT64_MAX / 8 / draws->elements) return DTTA_BAD_ARGUMENT;
  if (draws->step < 0 || draws->step >= kWords) return DTTA_BAD_ARGUMENT;
  if (draws->pair0 < 0 || draws->pair0 > kWords - 1 - draws->pairs) return DTTA_BAD_ARGUMENT;  // the last pair is the timesteps'
  for (int64_t n = 0; n < draws->images * draws->pairs; ++n) {
    if (draws->timesteps[n] < 0 || draws->timesteps[n] >= draws->table_rows) return DTTA_BAD_TIMESTEP;
  }
  for (int64_t b = 0; b < draws->images; ++b) {
    if (draws->image_ids[b] < 0 || draws->image_ids[b] >= kWords) return DTTA_BAD_IMAGE_ID;
  }
  return DTTA_OK;
}

}  // namespace

int dtta_add_noise(const dtta_draws* draws, void* x_t, int32_t x_t_type, int32_t threads) {
  if (x_t == nullptr || !dtta::known_type(x_t_type)) return DTTA_BAD_ARGUMENT;
  if (const int error = check(draws)) return error;
  const dtta::KernelTable& kernels = dtta::kernels();
  const int64_t rows = draws->images * draws->pairs, elements = draws->elements;
  const int64_t blocks = (elements + dtta::kBlock - 1) / dtta::kBlock;
  dtta::parallel(rows * blocks, rows * elements, threads, [&](int64_t task) {
    const int64_t row = task / blocks, first = task % blocks * dtta::kBlock;
    const int64_t last = first + dtta::kBlock < elements ? first + dtta::kBlock : elements;
    kernels.add_noise(*draws, x_t, x_t_type, row, first, last);
  });
  return DTTA_OK;
}

int dtta_denoising_loss(const dtta_draws* draws, const void* prediction, int32_t prediction_type, int64_t prediction_stride, int32_t l1,
                        float* loss, const float* upstream, void* gradient, int64_t gradient_stride, int32_t threads) {
  if (!prediction || !loss || !dtta::known_type(prediction_type) || (gradient && !upstream)) return DTTA_BAD_ARGUMENT;
  if (const int error = check(draws)) return error;
  const int64_t rows = draws->images * draws->pairs, longest = INT64_MAX / 8 / rows;
  if (prediction_stride < draws->elements || prediction_stride > longest) return DTTA_BAD_ARGUMENT;
  if (gradient && (gradient_stride < draws->elements || gradient_stride > longest)) return DTTA_BAD_ARGUMENT;
  if (gradient == prediction && gradient_stride != prediction_stride) return DTTA_BAD_ARGUMENT;  // rows would run into each other
  const dtta::KernelTable& kernels = dtta::kernels();
  const dtta::Loss all = {draws, prediction, loss, upstream, gradient, prediction_stride, gradient_stride, prediction_type, l1 != 0};
  // a row is a task: its sum has one order, whatever the number of threads
  dtta::parallel(rows, rows * draws->elements, threads, [&](int64_t row) { kernels.denoising_loss(all, row); });
  return DTTA_OK;
}
