// The kernels for portable. All code is in a namespace of that name: the linker must not serve it to another instruction set.
#define DTTA_ISA portable
// clang-format off: each is written in those before it
#include "inline.h"
#include "kernel_table.h"
#include "simd_portable.h"
#include "stream.h"
#include "philox.h"
#include "noise_kernels.h"
#include "mix_kernels.h"
// clang-format on

namespace dtta {

const KernelTable kPortable = {"portable", portable::add_noise, portable::denoising_loss, portable::weighted_sum, portable::dot};

}  // namespace dtta
