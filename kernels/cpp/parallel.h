// Numbered tasks on several threads.
#ifndef DTTA_PARALLEL_H
#define DTTA_PARALLEL_H

#include <stdint.h>

namespace dtta {

// body(context, i) once for each i < tasks, on the caller's thread alone where work (elements, about) is small. body must not throw.
void parallel(int64_t tasks, int64_t work, int threads, void (*body)(const void* context, int64_t task), const void* context);

template <typename Body>
void parallel(int64_t tasks, int64_t work, int threads, const Body& body) {
  parallel(tasks, work, threads, [](const void* context, int64_t task) { (*static_cast<const Body*>(context))(task); }, &body);
}

}  // namespace dtta
#endif
