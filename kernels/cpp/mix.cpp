// mix_condition and its backward behind the C ABI: what is small, the softmax and its gradient, in scalars; the rest in vectors.
#include <math.h>
#include <string.h>

#include <memory>
#include <new>

#include "dispatch.h"
#include "half.h"
#include "parallel.h"

namespace {

// numbers and classes of a task; the next task is the same part for the next image, which finds the embeddings in the cache
constexpr int64_t kNumbers = 128, kClasses = 16;

float read(const void* base, int type, int64_t i) {
  if (type == DTTA_FLOAT32) return static_cast<const float*>(base)[i];
  const uint16_t half = static_cast<const uint16_t*>(base)[i];
  return type == DTTA_BFLOAT16 ? dtta::from_bfloat16(half) : dtta::from_float16(half);
}

void write(void* base, int type, int64_t i, float x) {
  if (type == DTTA_FLOAT32) {
    static_cast<float*>(base)[i] = x;
  } else {
    static_cast<uint16_t*>(base)[i] = type == DTTA_BFLOAT16 ? dtta::to_bfloat16(x) : dtta::to_float16(x);
  }
}

const void* advance(const void* base, int type, int64_t count) {
  return static_cast<const char*>(base) + count * (type == DTTA_FLOAT32 ? 4 : 2);
}

void* advance(void* base, int type, int64_t count) { return const_cast<void*>(advance(static_cast<const void*>(base), type, count)); }

int check(const dtta_mixture* mixture) {
  if (mixture == nullptr || !mixture->logits || !mixture->embeddings) return DTTA_BAD_ARGUMENT;
  if (!dtta::known_type(mixture->logits_type) || !dtta::known_type(mixture->embeddings_type)) return DTTA_BAD_ARGUMENT;
  if (mixture->images < 1 || mixture->classes < 1 || mixture->numbers < 1) return DTTA_BAD_ARGUMENT;
  if (mixture->images > INT64_MAX / 8 / mixture->classes) return DTTA_BAD_ARGUMENT;
  if (mixture->images * mixture->classes > INT64_MAX / 8 / mixture->numbers) return DTTA_BAD_ARGUMENT;
  if (!(mixture->logit_scale >= 0.0) || isinf(mixture->logit_scale)) return DTTA_BAD_ARGUMENT;
  if (mixture->chosen == nullptr) return DTTA_OK;
  if (mixture->count < 1 || mixture->count > mixture->classes) return DTTA_BAD_ARGUMENT;
  for (int64_t i = 0; i < mixture->images * mixture->count; ++i) {
    if (mixture->chosen[i] < 0 || mixture->chosen[i] >= mixture->classes) return DTTA_BAD_CLASS;
  }
  return DTTA_OK;
}

// The classes of an image that take part.
struct Chosen {
  const int64_t* classes;
  int64_t count;
  int64_t operator[](int64_t i) const { return classes == nullptr ? i : classes[i]; }
};

Chosen chosen_of(const dtta_mixture& mixture, int64_t image) {
  if (mixture.chosen == nullptr) return {nullptr, mixture.classes};
  return {mixture.chosen + image * mixture.count, mixture.count};
}

// max(|logits of the image|, 1e-12)
float norm(const dtta_mixture& mixture, int64_t image) {
  double squares = 0.0;
  for (int64_t k = 0; k < mixture.classes; ++k) {
    const double z = read(mixture.logits, mixture.logits_type, image * mixture.classes + k);
    squares += z * z;
  }
  const double root = sqrt(squares);
  return static_cast<float>(root < 1e-12 ? 1e-12 : root);  // NaN stays
}

void softmax(const dtta_mixture& mixture, int64_t image, float* weights) {
  const Chosen chosen = chosen_of(mixture, image);
  const bool scaled = mixture.logit_scale > 0.0;
  const float scale = scaled ? static_cast<float>(mixture.logit_scale) : 1.0f, length = scaled ? norm(mixture, image) : 1.0f;
  memset(weights, 0, static_cast<size_t>(mixture.classes) * sizeof(float));
  float highest = -INFINITY;
  for (int64_t i = 0; i < chosen.count; ++i) {
    const int64_t k = chosen[i];
    weights[k] = read(mixture.logits, mixture.logits_type, image * mixture.classes + k) / length * scale;
    if (weights[k] > highest) highest = weights[k];  // a NaN spreads through the total, as in torch
  }
  double total = 0.0;
  for (int64_t i = 0; i < chosen.count; ++i) total += weights[chosen[i]] = expf(weights[chosen[i]] - highest);
  for (int64_t i = 0; i < chosen.count; ++i) weights[chosen[i]] = static_cast<float>(weights[chosen[i]] / total);
}

// slopes [classes] becomes the gradient to z, then to the logits
void through_softmax(const dtta_mixture& mixture, int64_t image, const float* weights, float* slopes, void* to_logits) {
  const int64_t first = image * mixture.classes;
  double mean = 0.0, along = 0.0;
  for (int64_t k = 0; k < mixture.classes; ++k) mean += static_cast<double>(weights[k]) * slopes[k];
  for (int64_t k = 0; k < mixture.classes; ++k) slopes[k] = static_cast<float>(weights[k] * (slopes[k] - mean));
  const bool scaled = mixture.logit_scale > 0.0;
  const double length = scaled ? norm(mixture, image) : 1.0;
  for (int64_t k = 0; scaled && k < mixture.classes; ++k) {
    along += read(mixture.logits, mixture.logits_type, first + k) / length * slopes[k];
  }
  for (int64_t k = 0; k < mixture.classes; ++k) {
    double slope = slopes[k];
    if (scaled) slope = (slope - read(mixture.logits, mixture.logits_type, first + k) / length * along) * (mixture.logit_scale / length);
    write(to_logits, mixture.logits_type, first + k, static_cast<float>(slope));
  }
}

int64_t table_of(const dtta_mixture& mixture, int64_t image) {  // where an image's embeddings start
  return mixture.per_image ? image * mixture.classes * mixture.numbers : 0;
}

}  // namespace

int dtta_mix_condition(const dtta_mixture* mixture, float* weights, void* mixed, int32_t threads) {
  if (weights == nullptr || mixed == nullptr) return DTTA_BAD_ARGUMENT;
  if (const int error = check(mixture)) return error;
  const dtta_mixture& m = *mixture;
  const dtta::KernelTable& kernels = dtta::kernels();
  dtta::parallel(m.images, m.images * m.classes, threads, [&](int64_t image) { softmax(m, image, weights + image * m.classes); });
  const int64_t blocks = (m.numbers + kNumbers - 1) / kNumbers, work = m.images * m.numbers * chosen_of(m, 0).count;
  dtta::parallel(m.images * blocks, work, threads, [&](int64_t task) {
    const int64_t image = task % m.images, first = task / m.images * kNumbers;
    const Chosen chosen = chosen_of(m, image);
    const dtta::WeightedSum sum = {weights + image * m.classes, advance(m.embeddings, m.embeddings_type, table_of(m, image)),
                                   chosen.classes, advance(mixed, m.embeddings_type, image * m.numbers), 1, chosen.count, m.numbers,
                                   m.embeddings_type};
    kernels.weighted_sum(sum, first, first + kNumbers < m.numbers ? first + kNumbers : m.numbers);
  });
  return DTTA_OK;
}

int dtta_mix_condition_backward(const dtta_mixture* mixture, const void* upstream, const float* weights, void* to_logits,
                                void* to_embeddings, int32_t threads) {
  if (!upstream || !weights || !to_logits) return DTTA_BAD_ARGUMENT;
  if (const int error = check(mixture)) return error;
  const dtta_mixture& m = *mixture;
  const dtta::KernelTable& kernels = dtta::kernels();
  // zero for classes that take no part: their weight is zero too
  const std::unique_ptr<float[]> slopes(new (std::nothrow) float[static_cast<size_t>(m.images * m.classes)]());
  if (slopes == nullptr) return DTTA_NO_MEMORY;
  const int64_t used = chosen_of(m, 0).count, groups = (used + kClasses - 1) / kClasses;
  dtta::parallel(m.images * groups, m.images * used * m.numbers, threads, [&](int64_t task) {
    const int64_t image = task % m.images, first = task / m.images * kClasses;
    const Chosen chosen = chosen_of(m, image);
    for (int64_t i = first; i < used && i < first + kClasses; ++i) {
      const int64_t k = chosen[i];
      slopes[static_cast<size_t>(image * m.classes + k)] = kernels.dot(upstream, m.embeddings, m.embeddings_type, image * m.numbers,
                                                                       table_of(m, image) + k * m.numbers, m.numbers);
    }
  });
  dtta::parallel(m.images, m.images * m.classes, threads, [&](int64_t image) {
    through_softmax(m, image, weights + image * m.classes, slopes.get() + image * m.classes, to_logits);
  });
  if (to_embeddings == nullptr) return DTTA_OK;
  const int64_t rows = m.per_image ? m.images * m.classes : m.classes;
  dtta::parallel((rows + kClasses - 1) / kClasses, m.images * m.classes * m.numbers, threads, [&](int64_t task) {
    for (int64_t row = task * kClasses; row < rows && row < (task + 1) * kClasses; ++row) {
      const int64_t image = m.per_image ? row / m.classes : 0;
      const dtta::WeightedSum sum = {weights + row % m.classes + image * m.classes, advance(upstream, m.embeddings_type, image * m.numbers),
                                     nullptr, advance(to_embeddings, m.embeddings_type, row * m.numbers), m.classes,
                                     m.per_image ? 1 : m.images, m.numbers, m.embeddings_type};
      kernels.weighted_sum(sum, 0, m.numbers);
    }
  });
  return DTTA_OK;
}
