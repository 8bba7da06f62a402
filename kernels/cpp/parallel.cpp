#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "dtta_ops.h"

namespace {

constexpr int64_t kWorthThreads = 16384;  // elements: below, waking a thread costs more than it saves
std::atomic<dtta_thread_pool> thread_pool{nullptr};

struct Tasks {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) int64_t count;  // not in the cache line that every claim takes away
  void (*body)(const void*, int64_t);
  const void* context;
};

void enter(void* shared) {
  Tasks& tasks = *static_cast<Tasks*>(shared);
  for (int64_t i = tasks.next.fetch_add(1); i < tasks.count; i = tasks.next.fetch_add(1)) tasks.body(tasks.context, i);
}

}  // namespace

void dtta_use_thread_pool(dtta_thread_pool pool) { thread_pool.store(pool); }

void dtta::parallel(int64_t tasks, int64_t work, int threads, void (*body)(const void*, int64_t), const void* context) {
  Tasks shared;
  shared.count = tasks;
  shared.body = body;
  shared.context = context;
  const int64_t used = work < kWorthThreads ? 1 : std::min<int64_t>(threads, tasks);
  if (used <= 1) return enter(&shared);
  if (const dtta_thread_pool pool = thread_pool.load()) return pool(enter, &shared, static_cast<unsigned>(used), 0);
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<size_t>(used - 1));
    for (int64_t i = 1; i < used; ++i) helpers.emplace_back(enter, &shared);
  } catch (...) {  // no thread to be had: the others do its tasks
  }
  enter(&shared);
  for (std::thread& helper : helpers) helper.join();
}
