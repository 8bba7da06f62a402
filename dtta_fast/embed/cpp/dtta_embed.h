/* Adaptation in a C++ host: packages that `dtta export` or dtta_fast.embed.export() wrote. C++17, and no header of torch.
 *
 * What can fail returns an Expected; nothing throws but std::bad_alloc, and an Expected that is asked for what it does not hold. A package
 * holds native code, which runs in this process: load packages of people you trust. Neither Python nor a compiler is needed. A session's
 * destructor removes the temporary folders of its package: a host that ends by std::exit or a signal leaves them. */
#ifndef DTTA_EMBED_H
#define DTTA_EMBED_H

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace dtta {

enum class Code {
  bad_file,     /* no package there, or a damaged one */
  misfit,       /* for another torch, device, processor, version of this library, or other weights than expected */
  bad_argument, /* an image of another shape or outside [0, 1], an image id or a deadline out of range */
  failed        /* while it ran, memory included; the session can be used on */
};

struct Error {
  Code code;
  std::string message; /* names what was found and what to do */
};

/* A value, or why there is none. */
template <typename T>
class Expected {
 public:
  Expected(T value) : held_(std::move(value)) {}
  Expected(Error error) : held_(std::move(error)) {}
  explicit operator bool() const { return held_.index() == 0; }
  T& operator*() { return std::get<0>(held_); }
  const T& operator*() const { return std::get<0>(held_); }
  T* operator->() { return &std::get<0>(held_); }
  const T* operator->() const { return &std::get<0>(held_); }
  const Error& error() const { return std::get<1>(held_); }

 private:
  std::variant<T, Error> held_;
};

/* What a package says of itself: fields of dtta_fast.embed.Manifest, which has their meaning. */
struct Manifest {
  std::string torch, device, capability, instructions, weights, config, task;
  std::int64_t batch = 0, height = 0, width = 0;
  std::vector<std::int64_t> outputs; /* shape of the model's outputs, [batch, ...] */
  std::int64_t steps = 0, guard = 0, evaluations = 0;
  bool online = false;
  double tolerance = 0;
};

/* Pixels in [0, 1], not normalised, [batch, channels, height, width], of the manifest's sizes; read during the call alone. */
struct Images {
  const float* pixels = nullptr;
  std::int64_t batch = 0, channels = 3, height = 0, width = 0;
};

struct Options {
  std::vector<std::int64_t> image_ids; /* [batch], 0 .. 2^32 - 1; empty: 0 .. batch - 1. An image's draws depend on it */
  /* From the call on: no step is begun that would end later, going by the last ones (see warm_up()); where no time is left for the guard,
   * the answer from before stands. */
  std::optional<double> deadline_ms;
};

struct Result {
  std::vector<float> outputs, outputs_before;           /* of the manifest's shape; where the answer before stands they are equal */
  std::vector<double> predictions, predictions_before;  /* classes [batch], or labels or depths [batch, height, width] */
  std::vector<float> loss;                              /* [batch, steps_run]; NaN for an image that was left alone */
  std::vector<bool> accepted;                           /* [batch] */
  std::vector<std::int64_t> evaluations;                /* [batch] denoiser forwards */
  std::int64_t steps_run = 0;
  std::vector<double> step_seconds; /* [steps_run] */
  double seconds = 0;               /* of the call */
  std::vector<std::string> calls;   /* the package's functions that ran, in order, such as start, step, finish, decide */
};

/* A loaded package with its adapted weights. Calls from several threads take turns. */
class Session {
 public:
  /* weights: where it is not empty, the fingerprint that the manifest has to bear. */
  static Expected<Session> load(const std::string& path, const std::string& weights = "");

  /* Runs all that adapt() may run, so that threads, caches and memory are there, and steps are timed. An online state stays as it was. */
  Expected<double> warm_up(); /* seconds of the last of its runs */

  Expected<Result> adapt(const Images& images, const Options& options = {});

  /* Back to the weights of the export, and an empty optimizer. */
  void reset();

  /* An online state as bytes, and back: of this package alone. What does not fit is an error, and the state stays as it was. */
  std::string state() const;
  std::optional<Error> restore(const std::string& state);

  const Manifest& manifest() const;

  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

 private:
  struct Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dtta

#endif
