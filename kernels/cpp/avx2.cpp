// The kernels for avx2. All code is in a namespace of that name: the linker must not serve it to another instruction set.
#define DTTA_ISA avx2
// clang-format off: each is written in those before it
#include "inline.h"
#include "kernel_table.h"
#include "simd_avx2.h"
#include "stream.h"
#include "philox.h"
#include "noise_kernels.h"
#include "mix_kernels.h"
// clang-format on

namespace dtta {

const KernelTable kAvx2 = {"avx2", avx2::add_noise, avx2::denoising_loss, avx2::weighted_sum, avx2::dot};

}  // namespace dtta
