// Weighted sums and dot products of rows of embeddings.
namespace dtta {
namespace DTTA_ISA {

template <int Vectors>
DTTA_INLINE void weighted_sum_chunk(const WeightedSum& sum, int64_t first, int64_t count) {
  Float sums[Vectors];
  for (int j = 0; j < Vectors; ++j) sums[j] = splat(0.0f);
  for (int64_t i = 0; i < sum.count; ++i) {
    const int64_t row = sum.chosen == nullptr ? i : sum.chosen[i];
    const Float weight = splat(sum.weights[row * sum.weight_stride]);
    const int64_t at = row * sum.numbers + first;
    for (int j = 0; j < Vectors; ++j) {
      sums[j] = fma(weight, load_some(sum.rows, sum.type, at + j * kWidth, count - j * kWidth), sums[j]);
    }
  }
  for (int j = 0; j < Vectors; ++j) store_some(sum.out, sum.type, first + j * kWidth, sums[j], count - j * kWidth);
}

inline void weighted_sum(const WeightedSum& sum, int64_t begin, int64_t end) {
  int64_t first = begin;
  for (; end - first >= 8 * kWidth; first += 8 * kWidth) weighted_sum_chunk<8>(sum, first, 8 * kWidth);
  for (; first < end; first += kWidth) weighted_sum_chunk<1>(sum, first, end - first);
}

inline float dot(const void* left, const void* right, int type, int64_t first_left, int64_t first_right, int64_t numbers) {
  double total = 0.0;
  for (int64_t block = 0; block < numbers; block += kBlock) {
    const int64_t end = block + kBlock < numbers ? block + kBlock : numbers;
    Float sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    for (int64_t here = block; here < end; here += 4 * kWidth) {
      for (int j = 0; j < 4; ++j) {
        const int64_t at = here + j * kWidth;
        sums[j] = fma(load_some(left, type, first_left + at, end - at), load_some(right, type, first_right + at, end - at), sums[j]);
      }
    }
    total += lane_sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
  return static_cast<float>(total);
}

}  // namespace DTTA_ISA
}  // namespace dtta
