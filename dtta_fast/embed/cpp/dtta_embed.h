/* Runs adaptations in a C++ host, from packages written by `dtta export` or dtta_fast.embed.export(). C++17, without torch headers.
 *
 * Functions that can fail return an Expected. The only exceptions are std::bad_alloc, and std::bad_variant_access if you read a value from an
 * Expected that holds an error. A package contains native code that runs in this process: only load packages from people you trust. You need
 * neither Python nor a compiler. A session's destructor removes the temporary folders of its package; a host that ends by std::exit or a
 * signal leaves them behind. */
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
  bad_file,     /* the file is missing, damaged, or no package */
  misfit,       /* the package needs another torch, device, processor or version of this library, or has unexpected weights */
  bad_argument, /* an image has another shape or values outside [0, 1]; an image id or the deadline is out of range */
  failed        /* something failed during the run, such as an allocation; you can keep using the session */
};

struct Error {
  Code code;
  std::string message; /* names the argument, its value and the remedy */
};

/* A value, or the error that prevented it. */
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

/* Describes a package; dtta_fast.embed.Manifest documents the fields. */
struct Manifest {
  std::string torch, device, capability, instructions, weights, config, task;
  std::int64_t batch = 0, height = 0, width = 0;
  std::vector<std::int64_t> outputs; /* shape of the model's outputs, [batch, ...] */
  std::int64_t steps = 0, guard = 0, evaluations = 0;
  bool online = false;
  double tolerance = 0;
};

/* Pixels [batch, channels, height, width] in [0, 1], not normalised, with the sizes in the manifest. They are only read during the call. */
struct Images {
  const float* pixels = nullptr;
  std::int64_t batch = 0, channels = 3, height = 0, width = 0;
};

struct Options {
  std::vector<std::int64_t> image_ids; /* [batch], 0 .. 2^32 - 1, identifies each image's random draws; empty means 0 .. batch - 1 */
  /* Time budget, counted from the call. No step is started if it is expected to end too late; the estimate comes from recent steps (see
   * warm_up()). If no time is left for the guard, the unadapted model's answer stands. */
  std::optional<double> deadline_ms;
};

struct Result {
  std::vector<float> outputs, outputs_before;           /* shaped like the manifest's outputs */
  std::vector<double> predictions, predictions_before;  /* classes [batch], or labels or depth [batch, height, width] */
  std::vector<float> loss;                              /* [batch, steps_run]; NaN for an image that the pre-check excluded */
  std::vector<bool> accepted;                           /* [batch] */
  std::vector<std::int64_t> evaluations;                /* [batch], denoiser evaluations */
  std::int64_t steps_run = 0;
  std::vector<double> step_seconds; /* [steps_run] */
  double seconds = 0;               /* for the whole call */
  std::vector<std::string> calls;   /* the package's functions that ran, in order, such as start, step, finish and decide */
};

/* A loaded package with its adapted weights. Threads may share a session; their calls run one at a time. */
class Session {
 public:
  /* weights: the fingerprint that the manifest must have; empty accepts any. */
  static Expected<Session> load(const std::string& path, const std::string& weights = "");

  /* Runs and times everything that adapt() may run, without changing an online state. Returns the seconds of the last run. */
  Expected<double> warm_up();

  Expected<Result> adapt(const Images& images, const Options& options = {});

  /* Restores the exported weights and an empty optimizer state. */
  void reset();

  /* Saves an online state as bytes, and restores it in a session of the same package. On an error the state is unchanged. */
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
