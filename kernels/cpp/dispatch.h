// The instruction set in use.
#ifndef DTTA_DISPATCH_H
#define DTTA_DISPATCH_H

#include "kernel_table.h"

namespace dtta {

const KernelTable& kernels();

inline bool known_type(int type) { return type == DTTA_FLOAT32 || type == DTTA_BFLOAT16 || type == DTTA_FLOAT16; }

}  // namespace dtta
#endif
