// Adapts images by a package and prints the classes before and after.
//
//   host PACKAGE.pt2 IMAGES.f32 [DEADLINE_MS]
//
// IMAGES.f32 holds float32 pixels in [0, 1], [N, 3, height, width] of the package's size: what images.numpy().tofile("IMAGES.f32") writes.
#include <dtta_embed.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

namespace {

int failed(const dtta::Error& error) {
  std::fprintf(stderr, "host: %s\n", error.message.c_str());
  return 2;
}

std::vector<float> read_floats(const char* path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return {};
  std::vector<float> values(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(float)));
  return values;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    std::fprintf(stderr, "usage: host PACKAGE.pt2 IMAGES.f32 [DEADLINE_MS]\n");
    return 2;
  }
  auto session = dtta::Session::load(arguments[1]);
  if (!session) return failed(session.error());
  const dtta::Manifest& manifest = session->manifest();
  const size_t pixels = static_cast<size_t>(3 * manifest.height * manifest.width), batch = static_cast<size_t>(manifest.batch);
  const std::vector<float> images = read_floats(arguments[2]);
  if (images.empty() || images.size() % (pixels * batch) != 0) {
    std::fprintf(stderr, "host: %s holds %zu floats; give a multiple of %zu\n", arguments[2], images.size(), pixels * batch);
    return 2;
  }
  auto warm = session->warm_up();
  if (!warm) return failed(warm.error());

  std::vector<double> milliseconds;
  for (size_t i = 0; i < images.size() / pixels; i += batch) {
    dtta::Options options;
    for (size_t k = 0; k < batch; ++k) options.image_ids.push_back(static_cast<std::int64_t>(i + k));
    if (count == 4) options.deadline_ms = std::atof(arguments[3]);
    auto found = session->adapt({&images[i * pixels], manifest.batch, 3, manifest.height, manifest.width}, options);
    if (!found) return failed(found.error());
    for (size_t k = 0; k < batch; ++k)
      std::printf("image %zu: class %.0f before, %.0f after %lld steps, %lld evaluations%s\n", i + k, found->predictions_before[k],
                  found->predictions[k], static_cast<long long>(found->steps_run), static_cast<long long>(found->evaluations[k]),
                  found->accepted[k] ? "" : " (the answer before stands)");
    milliseconds.push_back(found->seconds * 1000);
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("%zu calls: median %.1f ms, longest %.1f ms\n", milliseconds.size(), milliseconds[milliseconds.size() / 2], milliseconds.back());
  return 0;
}
