/* The C ABI of the ops on the CPU; ../reference.py defines what they compute.
 *
 * Tensors are contiguous. `type` is DTTA_FLOAT32, DTTA_BFLOAT16 or DTTA_FLOAT16; arithmetic is float32. A call returns DTTA_OK, or
 * another code with nothing written. `threads` is the most to use; results have the same bits for any number of them. */
#ifndef DTTA_OPS_H
#define DTTA_OPS_H

#include "dtta_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DTTA_FLOAT32 = 0, DTTA_BFLOAT16 = 1, DTTA_FLOAT16 = 2 };
enum {
  DTTA_OK = 0,
  DTTA_BAD_ARGUMENT = 1, /* a null pointer, an unknown type, a size, step or pair out of range */
  DTTA_BAD_TIMESTEP = 2, /* outside the table */
  DTTA_BAD_IMAGE_ID = 3, /* outside 0 .. 2^32 - 1 */
  DTTA_BAD_CLASS = 4,    /* a chosen class outside 0 .. classes - 1 */
  DTTA_NO_MEMORY = 5
};

/* 10^6 * DTTA_ABI_VERSION + 1000 * sizeof(dtta_draws) + sizeof(dtta_mixture): a caller compares it with what it was written for. */
#define DTTA_ABI_VERSION 1
DTTA_API int64_t dtta_abi(void);

/* What the noise of images * pairs rows depends on. Row n is pair n % pairs of image n / pairs. */
typedef struct {
  const void* x0;           /* [images][elements] */
  const float* table;       /* [table_rows][5]: a, s, u, v, w */
  const int64_t* timesteps; /* [images][pairs] */
  const int64_t* image_ids; /* [images] */
  const void* noise;        /* [images][pairs][elements], or NULL: drawn by Philox */
  int64_t table_rows, images, pairs, elements;
  int64_t step, pair0;
  uint64_t seed;
  int32_t x0_type, noise_type;
} dtta_draws;

/* A function with the signature of libgomp's GOMP_parallel: runs task(context) on `threads` threads and returns after the last.
 * NULL, the default: threads of our own. Not to be changed while an op runs. */
typedef void (*dtta_thread_pool)(void (*task)(void*), void* context, unsigned threads, unsigned flags);
DTTA_API void dtta_use_thread_pool(dtta_thread_pool pool);

/* "avx512", "avx2" or "portable"; the best one that the processor has is taken unless this says otherwise. NULL goes back to it.
 * DTTA_BAD_ARGUMENT where the processor or the build has none of that name. */
DTTA_API int dtta_use_instruction_set(const char* name);
DTTA_API const char* dtta_instruction_set(void);

/* x_t [images * pairs][elements] = a x0 + s noise. No allocation with a thread pool. */
DTTA_API int dtta_add_noise(const dtta_draws* draws, void* x_t, int32_t x_t_type, int32_t threads);

/* loss [images * pairs] = w mean(difference^2), or |difference| with l1, where difference = prediction - (u x0 + v noise).
 *
 * Row n of prediction starts at element n * prediction_stride; the first `elements` are read. gradient, in the prediction's type, is
 * NULL or gets upstream[n] dloss/dprediction; the elements from `elements` to gradient_stride - 1 of each of its rows become zero. It
 * may be the prediction itself, with the same stride. No allocation with a thread pool. */
DTTA_API int dtta_denoising_loss(const dtta_draws* draws, const void* prediction, int32_t prediction_type, int64_t prediction_stride,
                                 int32_t l1, float* loss, const float* upstream, void* gradient, int64_t gradient_stride,
                                 int32_t threads);

/* What a mixture reads. */
typedef struct {
  const void* logits;     /* [images][classes] */
  const void* embeddings; /* [classes][numbers]; with per_image [images][classes][numbers] */
  const int64_t* chosen;  /* [images][count], the distinct classes that take part; or NULL: all */
  int64_t images, classes, numbers, count;
  double logit_scale; /* z = logit_scale logits / |logits|; 0: z = logits */
  int32_t logits_type, embeddings_type, per_image;
} dtta_mixture;

/* weights [images][classes] = softmax(z), 0 for classes that are not chosen; mixed [images][numbers] in the embeddings' type. */
DTTA_API int dtta_mix_condition(const dtta_mixture* mixture, float* weights, void* mixed, int32_t threads);

/* Gradients for upstream [images][numbers], in the embeddings' type, and the forward's weights: to_logits in the logits' type and, unless
 * NULL, to_embeddings like the embeddings. Allocates images * classes floats. */
DTTA_API int dtta_mix_condition_backward(const dtta_mixture* mixture, const void* upstream, const float* weights, void* to_logits,
                                         void* to_embeddings, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
