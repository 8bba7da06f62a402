/* The ops of namespace dtta_fast for the packages' functions, by the kernels' C ABI. */
#ifndef DTTA_EMBED_OPS_H
#define DTTA_EMBED_OPS_H

namespace dtta {

/* Makes them known to torch, once; not where a Python in this process has done so. Throws c10::Error for kernels of another ABI. */
void register_ops();

}  // namespace dtta

#endif
