// A C++ host whose figures and answers go to standard output as JSON.
//
//   measure outputs PACKAGE IMAGES.f32           every image: outputs, loss, evaluations, acceptance
//   measure latency PACKAGE IMAGES.f32 CALLS     seconds of loads, of steps, and of calls on image 0
//   measure turns PACKAGE IMAGES.f32             for each line of standard input a call on image 0, and its seconds and its steps
//   measure deadlines PACKAGE IMAGES.f32 MS ...  seconds and steps of calls on image 0 under each deadline
//   measure stream PACKAGE IMAGES.f32            of an online package, whether its state can be taken away, brought back, and warmed beside
//   measure refusals PACKAGE IMAGES.f32          what bad input is told, and whether the session works after it
#include <dtta_embed.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

[[noreturn]] void stop(const std::string& message) {
  std::fprintf(stderr, "measure: %s\n", message.c_str());
  std::exit(2);
}

template <typename T>
std::string list(const std::vector<T>& values) {
  std::string found = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    char number[40];
    std::snprintf(number, sizeof number, "%.9g", static_cast<double>(values[i]));
    found += (i ? ", " : "") + (std::isfinite(static_cast<double>(values[i])) ? std::string(number) : "NaN");
  }
  return found + "]";
}

std::string list(const std::vector<std::string>& names) {
  std::string found = "[";
  for (size_t i = 0; i < names.size(); ++i) found += (i ? ", \"" : "\"") + names[i] + "\"";
  return found + "]";
}

/* Sums round otherwise where memory is otherwise aligned. */
bool close(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - b[i]) < 5e-4f)) return false;
  return a.size() == b.size();
}

struct Input {
  std::vector<float> pixels;
  size_t image = 0;  // floats of one
};

Input read(const char* path, const dtta::Manifest& manifest) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) stop(std::string("no file ") + path);
  Input found{std::vector<float>(static_cast<size_t>(file.tellg()) / sizeof(float)), static_cast<size_t>(3 * manifest.height * manifest.width)};
  file.seekg(0);
  file.read(reinterpret_cast<char*>(found.pixels.data()), static_cast<std::streamsize>(found.pixels.size() * sizeof(float)));
  return found;
}

dtta::Session loaded(const char* path) {
  auto session = dtta::Session::load(path);
  if (!session) stop(session.error().message);
  return std::move(*session);
}

dtta::Result adapted(dtta::Session& session, const float* pixels, std::int64_t id, const dtta::Options* given = nullptr) {
  const dtta::Manifest& m = session.manifest();
  dtta::Options options = given ? *given : dtta::Options{};
  for (std::int64_t k = 0; k < m.batch; ++k) options.image_ids.push_back(id + k);
  auto found = session.adapt({pixels, m.batch, 3, m.height, m.width}, options);
  if (!found) stop(found.error().message);
  return std::move(*found);
}

void outputs(dtta::Session& session, const Input& input) {
  const size_t batch = static_cast<size_t>(session.manifest().batch);
  std::printf("[");
  for (size_t i = 0; (i + batch) * input.image <= input.pixels.size(); i += batch) {
    const dtta::Result r = adapted(session, &input.pixels[i * input.image], static_cast<std::int64_t>(i));
    std::vector<int> accepted(r.accepted.begin(), r.accepted.end());
    std::printf("%s{\"outputs\": %s, \"outputs_before\": %s, \"predictions\": %s, \"loss\": %s, \"evaluations\": %s, \"accepted\": %s, \"calls\": %s}",
                i ? ",\n" : "", list(r.outputs).c_str(), list(r.outputs_before).c_str(), list(r.predictions).c_str(), list(r.loss).c_str(),
                list(r.evaluations).c_str(), list(accepted).c_str(), list(r.calls).c_str());
  }
  std::printf("]\n");
}

void latency(const char* path, const char* images, int calls) {
  std::vector<double> loads, steps, whole;
  for (int i = 0; i < 11; ++i) {
    const auto start = Clock::now();
    const dtta::Session once = loaded(path);
    loads.push_back(seconds_since(start));
  }
  dtta::Session session = loaded(path);
  const Input input = read(images, session.manifest());
  auto warm = session.warm_up();
  if (!warm) stop(warm.error().message);
  for (int i = 0; i < calls; ++i) {
    const dtta::Result r = adapted(session, input.pixels.data(), 0);
    steps.insert(steps.end(), r.step_seconds.begin(), r.step_seconds.end());
    whole.push_back(r.seconds);
  }
  std::printf("{\"load\": %s, \"step\": %s, \"call\": %s}\n", list(loads).c_str(), list(steps).c_str(), list(whole).c_str());
}

void turns(dtta::Session& session, const Input& input) {
  auto warm = session.warm_up();
  if (!warm) stop(warm.error().message);
  for (int turn; (turn = std::getchar()) != EOF;) {
    if (turn != '\n') continue;
    const dtta::Result r = adapted(session, input.pixels.data(), 0);
    std::printf("{\"call\": %.9g, \"step\": %s}\n", r.seconds, list(r.step_seconds).c_str());
    std::fflush(stdout);
  }
}

void deadlines(dtta::Session& session, const Input& input, int count, char** given) {
  auto warm = session.warm_up();
  if (!warm) stop(warm.error().message);
  for (int i = 0; i < 20; ++i) adapted(session, input.pixels.data(), 0);
  std::printf("[");
  for (int i = 0; i < count; ++i)
    for (int repeat = 0; repeat < 20; ++repeat) {
      dtta::Options options;
      options.deadline_ms = std::atof(given[i]);
      const dtta::Result r = adapted(session, input.pixels.data(), 0, &options);
      std::printf("%s{\"deadline_ms\": %g, \"seconds\": %.9g, \"steps\": %lld}", i + repeat ? ",\n" : "", *options.deadline_ms, r.seconds,
                  static_cast<long long>(r.steps_run));
    }
  std::printf("]\n");
}

void stream(dtta::Session& session, const Input& input) {
  const float* second = &input.pixels[input.image * static_cast<size_t>(session.manifest().batch)];
  adapted(session, input.pixels.data(), 0);
  const std::string state = session.state();
  const std::vector<float> once = adapted(session, second, 0).outputs;
  const std::vector<float> later = adapted(session, second, 0).outputs;
  auto refused = session.restore(state);
  auto warm = session.warm_up();
  if (refused || !warm) stop("the state was not taken");
  const std::vector<float> again = adapted(session, second, 0).outputs;
  session.reset();
  const std::vector<float> fresh = adapted(session, second, 0).outputs;
  auto damaged = session.restore(state.substr(1));
  std::printf("{\"again\": %d, \"moves\": %d, \"fresh\": %d, \"damaged\": \"%s\"}\n", close(once, again), !close(once, later), !close(once, fresh),
              damaged ? damaged->message.c_str() : "");
}

void refusals(const char* path, dtta::Session& session, const Input& input) {
  const dtta::Manifest& m = session.manifest();
  const dtta::Images good{input.pixels.data(), m.batch, 3, m.height, m.width};
  std::vector<float> wild(input.pixels.begin(), input.pixels.begin() + static_cast<std::ptrdiff_t>(input.image * static_cast<size_t>(m.batch)));
  wild[7] = 200;
  std::vector<float> nan = wild;
  nan[7] = std::numeric_limits<float>::quiet_NaN();
  dtta::Options no_time, negative, not_a_number, far_id, many_ids;
  no_time.deadline_ms = 0;
  negative.deadline_ms = -5;
  not_a_number.deadline_ms = std::nan("");
  far_id.image_ids.assign(static_cast<size_t>(m.batch), std::int64_t{1} << 32);
  many_ids.image_ids.assign(static_cast<size_t>(m.batch) + 1, 0);

  const std::vector<float> before = adapted(session, input.pixels.data(), 0).outputs;
  std::string told;
  const auto tell = [&](const char* what, const dtta::Error& error) {
    told += std::string(told.empty() ? "" : ",\n") + "{\"what\": \"" + what + "\", \"code\": " + std::to_string(static_cast<int>(error.code)) +
            ", \"message\": \"" + error.message + "\"}";
  };
  const auto refuse = [&](const char* what, const dtta::Images& images, const dtta::Options& options) {
    auto found = session.adapt(images, options);
    if (found) stop(std::string(what) + " was taken");
    tell(what, found.error());
  };
  refuse("width", {input.pixels.data(), m.batch, 3, m.height, m.width + 1}, {});
  refuse("channels", {input.pixels.data(), m.batch, 1, m.height, m.width}, {});
  refuse("batch", {input.pixels.data(), m.batch + 1, 3, m.height, m.width}, {});
  refuse("null", {nullptr, m.batch, 3, m.height, m.width}, {});
  refuse("range", {wild.data(), m.batch, 3, m.height, m.width}, {});
  refuse("nan", {nan.data(), m.batch, 3, m.height, m.width}, {});
  refuse("deadline 0", good, no_time);
  refuse("deadline -5", good, negative);
  refuse("deadline nan", good, not_a_number);
  refuse("id", good, far_id);
  refuse("ids", good, many_ids);
  auto other = dtta::Session::load(path, "0123456789abcdef");
  if (other) stop("other weights were taken");
  tell("weights", other.error());
  for (const std::string& missing : {std::string("no_such.pt2"), std::string(300, 'x'), std::string("/proc/1/cwd/x.pt2")}) {
    auto none = dtta::Session::load(missing);
    if (none) stop("a missing file was taken");
    tell("missing", none.error());
  }
  if (auto refused = session.restore(session.state())) tell("state", *refused);

  std::vector<std::vector<float>> found(4);
  std::vector<std::thread> threads;
  for (auto& own : found) threads.emplace_back([&session, &input, &own] { own = adapted(session, input.pixels.data(), 0).outputs; });
  for (auto& thread : threads) thread.join();
  bool alive = true;
  for (const auto& own : found) alive = alive && close(own, before);
  std::printf("{\"told\": [%s], \"alive\": %s}\n", told.c_str(), alive ? "true" : "false");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 3 ? arguments[1] : "";
  if (mode == "latency" && count == 5) {
    latency(arguments[2], arguments[3], std::atoi(arguments[4]));
    return 0;
  }
  if (mode != "outputs" && mode != "turns" && mode != "deadlines" && mode != "stream" && mode != "refusals") stop("give a mode, a package and images: see measure.cpp");
  dtta::Session session = loaded(arguments[2]);
  const Input input = read(arguments[3], session.manifest());
  if (mode == "outputs") outputs(session, input);
  if (mode == "deadlines") deadlines(session, input, count - 4, arguments + 4);
  if (mode == "turns") turns(session, input);
  if (mode == "stream") stream(session, input);
  if (mode == "refusals") refusals(arguments[2], session, input);
  return 0;
}
