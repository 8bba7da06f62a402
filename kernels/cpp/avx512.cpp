// The kernels for avx512. All code is in a namespace of that name: the linker must not serve it to another instruction set.
#define DTTA_ISA avx512
// clang-format off: each is written in those before it
#include "inline.h"
#include "kernel_table.h"
#include "simd_avx512.h"
#include "stream.h"
#include "philox.h"
#include "noise_kernels.h"
#include "mix_kernels.h"
// clang-format on

namespace dtta {

const KernelTable kAvx512 = {"avx512", avx512::add_noise, avx512::denoising_loss, avx512::weighted_sum, avx512::dot};

}  // namespace dtta
