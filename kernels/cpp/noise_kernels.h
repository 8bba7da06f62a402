// add_noise and denoising_loss of one row. The noise is drawn, or read, a tile of four vectors at a time.
#include <string.h>

namespace dtta {
namespace DTTA_ISA {

constexpr int64_t kTile = 4 * kWidth;
static_assert(kBlock % kTile == 0, "a block is whole tiles");

inline Stream stream_of(const dtta_draws& draws, int64_t row) {
  return {static_cast<uint32_t>(draws.pair0 + row % draws.pairs), static_cast<uint32_t>(draws.image_ids[row / draws.pairs]),
          static_cast<uint32_t>(draws.step), draws.seed};
}

// count: elements left in the row
DTTA_INLINE void noise_tile(const dtta_draws& draws, const Stream& stream, int64_t row, int64_t first, int64_t count, Float* z) {
  if (draws.noise == nullptr) return normals(stream, first, z);
  const int64_t base = row * draws.elements + first;
  for (int j = 0; j < 4; ++j) z[j] = load_some(draws.noise, draws.noise_type, base + j * kWidth, count - j * kWidth);
}

inline void add_noise(const dtta_draws& draws, void* x_t, int x_t_type, int64_t row, int64_t begin, int64_t end) {
  const Stream stream = stream_of(draws, row);
  const float* coefficients = draws.table + draws.timesteps[row] * 5;
  const Float a = splat(coefficients[0]), s = splat(coefficients[1]);
  const int64_t from = row / draws.pairs * draws.elements, to = row * draws.elements;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = end - first;
    Float z[4];
    noise_tile(draws, stream, row, first, count, z);
    if (count >= kTile) {
      for (int j = 0; j < 4; ++j) {
        const int64_t here = first + j * kWidth;
        store(x_t, x_t_type, to + here, fma(a, load(draws.x0, draws.x0_type, from + here), multiply(s, z[j])));
      }
    } else {
      for (int j = 0; j < 4; ++j) {
        const int64_t here = first + j * kWidth, left = count - j * kWidth;
        const Float x0 = load_some(draws.x0, draws.x0_type, from + here, left);
        store_some(x_t, x_t_type, to + here, fma(a, x0, multiply(s, z[j])), left);
      }
    }
  }
}

// factor times sign(difference), 0 at 0 and NaN at NaN
DTTA_INLINE Float signed_factor(const Float& difference, const Float& absolute, const Float& factor) {
  const Float flipped = as_float(exclusive(as_word(factor), both(as_word(difference), splat_word(0x80000000u))));
  return select(is_positive(absolute), flipped, multiply(difference, factor));
}

inline void denoising_loss(const Loss& loss, int64_t row) {
  const dtta_draws& draws = *loss.draws;
  const Stream stream = stream_of(draws, row);
  const float* coefficients = draws.table + draws.timesteps[row] * 5;
  const Float u = splat(coefficients[2]), v = splat(coefficients[3]);
  const float elements = static_cast<float>(draws.elements), weight = coefficients[4];
  const float slope = loss.gradient == nullptr ? 0.0f : loss.upstream[row] * weight / elements;
  const Float factor = splat(loss.l1 ? slope : 2.0f * slope);
  const int64_t from = row / draws.pairs * draws.elements, predicted = row * loss.prediction_stride;
  const int64_t to = row * loss.gradient_stride;
  double total = 0.0;
  for (int64_t block = 0; block < draws.elements; block += kBlock) {  // float32 sums stay short, whatever the row's length
    const int64_t end = block + kBlock < draws.elements ? block + kBlock : draws.elements;
    Float sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    for (int64_t first = block; first < end; first += kTile) {
      const bool whole = end - first >= kTile;
      Float z[4];
      noise_tile(draws, stream, row, first, end - first, z);
      for (int j = 0; j < 4; ++j) {
        const int64_t here = first + j * kWidth, left = whole ? kWidth : end - here;
        const Float x0 = load_some(draws.x0, draws.x0_type, from + here, left);
        const Float prediction = load_some(loss.prediction, loss.type, predicted + here, left);
        Float difference = subtract(prediction, fma(u, x0, multiply(v, z[j])));
        if (!whole) difference = first_lanes(difference, left);
        const Float absolute = as_float(both(as_word(difference), splat_word(0x7FFFFFFFu)));
        sums[j] = loss.l1 ? add(sums[j], absolute) : fma(difference, difference, sums[j]);
        if (loss.gradient != nullptr) {
          const Float gradient = loss.l1 ? signed_factor(difference, absolute, factor) : multiply(difference, factor);
          store_some(loss.gradient, loss.type, to + here, gradient, left);
        }
      }
    }
    total += lane_sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
  loss.loss[row] = weight * static_cast<float>(total / static_cast<double>(draws.elements));
  const int64_t rest = loss.gradient_stride - draws.elements;  // the learned variance takes no part
  if (loss.gradient != nullptr && rest > 0) {
    const int64_t size = bytes_of(loss.type);
    memset(static_cast<char*>(loss.gradient) + (to + draws.elements) * size, 0, static_cast<size_t>(rest * size));
  }
}

}  // namespace DTTA_ISA
}  // namespace dtta
