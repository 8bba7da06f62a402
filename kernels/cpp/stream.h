// Vectors from and to tensors of a type known at run time, whole or the first `count` lanes.

namespace dtta {
namespace DTTA_ISA {

DTTA_INLINE Float load(const void* base, int type, int64_t index) {
  if (type == DTTA_FLOAT32) return load_float32(static_cast<const float*>(base) + index);
  const uint16_t* from = static_cast<const uint16_t*>(base) + index;
  return type == DTTA_BFLOAT16 ? load_bfloat16(from) : load_float16(from);
}

DTTA_INLINE void store(void* base, int type, int64_t index, const Float& a) {
  if (type == DTTA_FLOAT32) return store_float32(static_cast<float*>(base) + index, a);
  uint16_t* to = static_cast<uint16_t*>(base) + index;
  return type == DTTA_BFLOAT16 ? store_bfloat16(to, a) : store_float16(to, a);
}

inline int64_t bytes_of(int type) { return type == DTTA_FLOAT32 ? 4 : 2; }

// The lanes past `count` are zero, and memory past it is not touched.
DTTA_INLINE Float load_some(const void* base, int type, int64_t index, int64_t count) {
  if (count >= kWidth) return load(base, type, index);
  if (type == DTTA_FLOAT32) {
    float buffer[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<const float*>(base)[index + i];
    return load_float32(buffer);
  }
  uint16_t buffer[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<const uint16_t*>(base)[index + i];
  return load(buffer, type, 0);
}

DTTA_INLINE void store_some(void* base, int type, int64_t index, const Float& a, int64_t count) {
  if (count >= kWidth) return store(base, type, index, a);
  if (type == DTTA_FLOAT32) {
    float buffer[kWidth];
    store_float32(buffer, a);
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(base)[index + i] = buffer[i];
    return;
  }
  uint16_t buffer[kWidth];
  store(buffer, type, 0, a);
  for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(base)[index + i] = buffer[i];
}

DTTA_INLINE Float first_lanes(const Float& a, int64_t count) {
  float buffer[kWidth];
  store_float32(buffer, a);
  return load_some(buffer, DTTA_FLOAT32, 0, count);
}

// The lanes' sum in their order.
inline double lane_sum(const Float& a) {
  float buffer[kWidth];
  store_float32(buffer, a);
  double sum = 0.0;
  for (float lane : buffer) sum += lane;
  return sum;
}

}  // namespace DTTA_ISA
}  // namespace dtta
