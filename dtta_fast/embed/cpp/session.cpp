#include "dtta_embed.h"

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>

#include "ops.h"

namespace dtta {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Loader = torch::inductor::AOTIModelPackageLoader;
using Clock = std::chrono::steady_clock;
using Metadata = std::unordered_map<std::string, std::string>;

constexpr char kFormat[] = "2";      /* dtta_fast/embed/manifest.py */
constexpr long long kMost = 1 << 20; /* a size in a manifest is below: batch * 3 * height * width stays in 64 bits */
constexpr char kKeeper[] = "decide"; /* the function whose metadata the manifest is */
constexpr int64_t kWords = int64_t{1} << 32;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream found;
  (found << ... << parts);
  return found.str();
}

/* How long something takes: the upper quartile of its last runs but the very first; 0 where nothing is known. */
class Durations {
 public:
  void note(double seconds) {
    if (!first_) {
      last_.push_back(seconds);
      if (last_.size() > 16) last_.erase(last_.begin());
    }
    first_ = false;
  }
  double expected() const {
    if (last_.empty()) return 0;
    std::vector<double> sorted = last_;
    std::sort(sorted.begin(), sorted.end());
    return sorted[3 * sorted.size() / 4];
  }

 private:
  bool first_ = true;
  std::vector<double> last_;
};

int rank(const std::string& capability) {
  const std::vector<std::string> known = {"DEFAULT", "NO AVX", "AVX2", "AVX512"};
  return static_cast<int>(std::find(known.begin(), known.end(), capability) - known.begin());
}

Manifest read(const Metadata& metadata) {
  const auto number = [&](const char* name) {
    const std::string& written = metadata.at(name);
    size_t read = 0;
    const long long found = std::stoll(written, &read);
    TORCH_CHECK(read == written.size() && found < kMost, name);
    return found;
  };
  Manifest found;
  found.torch = metadata.at("torch");
  found.device = metadata.at("device");
  found.capability = metadata.at("capability");
  found.instructions = metadata.at("instructions");
  found.weights = metadata.at("weights");
  found.config = metadata.at("config");
  found.task = metadata.at("task");
  found.batch = number("batch");
  found.height = number("height");
  found.width = number("width");
  found.steps = number("steps");
  found.guard = number("guard");
  found.evaluations = number("evaluations");
  found.online = metadata.at("online") == "true";
  found.tolerance = std::stod(metadata.at("tolerance"));
  std::istringstream shape(metadata.at("outputs"));
  for (int64_t side; shape >> side;) found.outputs.push_back(side);
  TORCH_CHECK(found.batch > 0 && found.height > 0 && found.width > 0 && found.steps > 0 && found.guard >= 0, "sizes");
  return found;
}

/* Those of a package's instructions that this processor does not have, as Linux names them; none where it does not tell. */
std::string lacking(const std::string& instructions) {
  std::ifstream about("/proc/cpuinfo");
  std::string flags, found;
  for (std::string line; std::getline(about, line);)
    if (line.rfind("flags", 0) == 0) {
      flags = line + " ";
      break;
    }
  std::istringstream wanted(instructions);
  for (std::string name; !flags.empty() && wanted >> name;)
    if (flags.find(" " + name + " ") == std::string::npos) found += (found.empty() ? "" : ", ") + name;
  return found;
}

/* Why this process cannot run the package; empty where it can. */
std::string misfit(const Manifest& manifest, const std::string& weights) {
  std::string found;
  const auto say = [&](const std::string& what) { found += (found.empty() ? "" : "; ") + what; };
  if (manifest.torch != text(TORCH_VERSION_MAJOR, ".", TORCH_VERSION_MINOR, ".", TORCH_VERSION_PATCH))
    say(text("it was compiled by torch ", manifest.torch, ", and this host is built with ", TORCH_VERSION));
  if (manifest.device != "cpu") say(text("it is for device '", manifest.device, "', and packages run on 'cpu'"));
  const std::string here = at::get_cpu_capability();
  if (rank(manifest.capability) > rank(here)) say(text("its code takes ", manifest.capability, ", and this processor has ", here));
  const std::string missing = lacking(manifest.instructions);
  if (!missing.empty()) say(text("its code may take ", missing, ", which this processor does not have"));
  if (!weights.empty() && weights != manifest.weights)
    say(text("its weights have fingerprint ", manifest.weights, ", and ", weights, " was expected"));
  return found;
}

std::vector<float> floats(const Tensor& tensor) {
  const Tensor plain = tensor.to(at::kFloat).contiguous();
  return {plain.const_data_ptr<float>(), plain.const_data_ptr<float>() + plain.numel()};
}

std::vector<double> doubles(const Tensor& tensor) {
  const Tensor plain = tensor.to(at::kDouble).contiguous();
  return {plain.const_data_ptr<double>(), plain.const_data_ptr<double>() + plain.numel()};
}

std::string first_line(const std::exception& error) {
  const std::string all = error.what();
  return all.substr(0, all.find('\n'));
}

/* Whether each image's outputs [B, ...] are finite; -inf is allowed where `before` has it too: a masked class. */
Tensor usable(const Tensor& outputs, const Tensor& before) {
  const double infinity = std::numeric_limits<double>::infinity();
  return (outputs.isfinite() | ((outputs == -infinity) & (before == -infinity))).flatten(1).all(1);
}

/* Rows [B, ...] of `chosen` where the mask [B] is true, and of `otherwise` elsewhere. */
Tensor chosen_rows(const Tensor& mask, const Tensor& chosen, const Tensor& otherwise) {
  std::vector<int64_t> shape(static_cast<size_t>(chosen.dim()), 1);
  shape[0] = -1;
  return at::where(mask.view(shape), chosen, otherwise);
}

bool finite(const Tensors& state) {
  return std::all_of(state.begin(), state.end(), [](const Tensor& tensor) { return tensor.isfinite().all().item<bool>(); });
}

Tensors joined(Tensors first, std::initializer_list<Tensor> others) {
  first.insert(first.end(), others);
  return first;
}

}  // namespace

struct Session::Impl {
  Manifest manifest;
  std::map<std::string, std::unique_ptr<Loader>> functions;
  Tensors initial, state;
  Durations step, end, guard;
  std::vector<std::string> calls; /* the functions that the current call has run */
  std::mutex mutex;

  /* The first bytes of a saved state. */
  std::string label() const { return manifest.weights + "\n" + manifest.config + "\n"; }

  Tensors run(const std::string& name, const Tensors& inputs) {
    calls.push_back(name);
    return functions.at(name)->run(inputs);
  }

  std::string refusal(const Images& images, const Options& options) const {
    const Manifest& m = manifest;
    if (images.pixels == nullptr || images.batch != m.batch || images.channels != 3 || images.height != m.height || images.width != m.width)
      return text("images is [", images.batch, ", ", images.channels, ", ", images.height, ", ", images.width, "]",
                  images.pixels == nullptr ? " without pixels" : "", "; this package takes [", m.batch, ", 3, ", m.height, ", ", m.width, "]");
    const int64_t count = m.batch * 3 * m.height * m.width;
    for (int64_t i = 0; i < count; ++i)
      if (!(images.pixels[i] >= -1e-3f && images.pixels[i] <= 1 + 1e-3f))
        return text("images holds ", images.pixels[i], "; give [0, 1], not normalised");
    if (!options.image_ids.empty() && static_cast<int64_t>(options.image_ids.size()) != m.batch)
      return text("image_ids has ", options.image_ids.size(), " entries; give one an image: ", m.batch);
    for (const int64_t id : options.image_ids)
      if (id < 0 || id >= kWords) return text("image_ids holds ", id, "; give 0 .. 2^32 - 1");
    if (options.deadline_ms && !(*options.deadline_ms > 0))
      return text("deadline_ms is ", *options.deadline_ms, "; give a positive number of milliseconds, counted from the call");
    return "";
  }

  /* Adapts to a batch like Package._adapt in package.py. The state of an online package changes only if the call succeeds, is not warming,
   * and leaves a usable state. */
  Result adapt(const Images& images, const Options& options, Clock::time_point begun, bool warming) {
    const c10::NoGradGuard no_gradients;
    const c10::InferenceMode normal(false);  // the state is written to by later calls, which may run outside of the host's inference mode
    calls.clear();
    Tensors working = state;
    if (manifest.online)
      for (Tensor& tensor : working) tensor = tensor.clone();  // steps write in place, and a failed call must leave no trace
    else
      at::_foreach_copy_(working, initial);
    bool keep = false;
    Result result = loop(working, images, options, begun, warming, keep);
    if (keep && !warming) state = working;
    result.calls = calls;
    result.seconds = seconds_since(begun);
    return result;
  }

  /* The loop of session/loop.py: the same calls in the same order. warming: runs and times every part, even if no image needs it.
   * keep: set to whether later batches may continue from `working`. */
  Result loop(Tensors& working, const Images& images, const Options& options, Clock::time_point begun, bool warming, bool& keep) {
    const Manifest& m = manifest;
    const double limit = options.deadline_ms ? *options.deadline_ms / 1000 : std::numeric_limits<double>::infinity();
    const auto has_time = [&](std::initializer_list<const Durations*> parts) {
      double expected = seconds_since(begun);
      for (const Durations* part : parts) expected += part->expected();
      return expected <= limit;
    };
    const Tensor crop = at::from_blob(const_cast<float*>(images.pixels), {m.batch, 3, m.height, m.width}, at::kFloat).clone();
    const Tensor ids = at::arange(m.batch, at::kLong);
    std::copy(options.image_ids.begin(), options.image_ids.end(), ids.mutable_data_ptr<int64_t>());
    const auto started = [&](const Tensors& from) {
      Tensors given = {crop};
      if (m.online) given.insert(given.end(), from.begin(), from.end());
      return run("start", given);
    };
    const Tensors prepared = started(working);
    const Tensor &inputs = prepared[0], &x0 = prepared[1], &matched = prepared[3], &asked = prepared[4];
    Tensor before = prepared[2], after = matched, standing = chosen_rows(usable(matched, before), matched, before);
    Tensor accepted = at::zeros_like(asked), fresh = at::zeros({2, m.batch}, at::kBool);
    const size_t steps = warming || asked.any().item<bool>() ? static_cast<size_t>(m.steps) : 0;
    Result result;
    Tensors losses;
    while (losses.size() < steps && has_time({&step, &end, &guard})) {
      const auto start = Clock::now();
      losses.push_back(run("step", joined(working, {inputs, x0, ids}))[0]);
      result.step_seconds.push_back(seconds_since(start));
      step.note(result.step_seconds.back());
    }
    if (!losses.empty()) {
      const auto start = Clock::now();
      const Tensors finished = run("finish", joined(working, {inputs, before, matched, asked}));
      end.note(seconds_since(start));
      after = finished[0], standing = finished[1], accepted = finished[2], fresh = finished[3];
    }
    if (!has_time({&guard})) fresh = at::zeros_like(fresh);  // no changed answer is accepted without a comparison
    const auto start = Clock::now();
    const bool sound_before = !m.online || usable(before, before).all().item<bool>();
    const bool sound = sound_before && (!m.online || (finite(working) && usable(after, before).all().item<bool>()));
    const Tensors no_losses(3, at::zeros({m.batch, std::max<int64_t>(1, m.guard)}, x0.options()));
    Tensors held_out = no_losses;
    if (m.guard > 0 && (warming || fresh.any().item<bool>())) {
      const Tensor answers[] = {standing, after, before};
      for (size_t i = 0; i < 3; ++i)
        if (warming || i == 0 || fresh[static_cast<int64_t>(i) - 1].any().item<bool>())
          held_out[i] = run("losses", {answers[i], x0, ids, working.back()})[0];
      guard.note(seconds_since(start));
    }
    const auto decide = [&](const Tensor& changed, const Tensors& known) {
      return run("decide", {before, after, standing, accepted, changed, known[0], known[1], known[2]});
    };
    Tensors decided = decide(fresh, held_out);
    if (!sound_before) {  // the state is useless for these images: they get the source model's answers
      const Tensors again = started(run("state", {}));
      const Tensor &source = again[2], &source_matched = again[3];
      const Tensor stands = chosen_rows(usable(source_matched, source), source_matched, source);
      standing = chosen_rows(usable(decided[0], source), decided[0], stands);
      accepted = decided[1] & usable(decided[0], source);
      before = chosen_rows(usable(before, source), before, source);
      decided = decide(at::zeros_like(fresh), no_losses);
    }
    keep = m.online && !losses.empty() && sound;
    result.steps_run = static_cast<int64_t>(losses.size());
    result.outputs = floats(decided[0]);
    result.outputs_before = floats(before);
    result.predictions = doubles(decided[2]);
    result.predictions_before = doubles(decided[3]);
    if (!losses.empty()) result.loss = floats(at::where(asked.unsqueeze(1), at::stack(losses, 1), std::nan("")));
    const Tensor spent = asked.to(at::kLong) * (result.steps_run * m.evaluations) + (fresh.any(0).to(at::kLong) + fresh.sum(0)) * m.guard;
    for (int64_t i = 0; i < m.batch; ++i) {
      result.accepted.push_back(decided[1][i].item<bool>());
      result.evaluations.push_back(spent[i].item<int64_t>());
    }
    return result;
  }
};

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

const Manifest& Session::manifest() const { return impl_->manifest; }

Expected<Session> Session::load(const std::string& path, const std::string& weights) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return Error{Code::bad_file, text("path is '", path, "', and there is no such file")};
  auto impl = std::make_unique<Impl>();
  try {
    Metadata metadata;
    try {
      metadata = Loader::load_metadata_from_package(path, kKeeper);
    } catch (const std::exception& error) {
      return Error{Code::bad_file, text("'", path, "' is not a package of an adaptation: ", first_line(error))};
    }
    if (metadata["format"] != kFormat)
      return Error{Code::misfit, text("'", path, "' is of format '", metadata["format"], "', and this library reads ", kFormat)};
    try {
      impl->manifest = read(metadata);
    } catch (const std::exception&) {
      return Error{Code::bad_file, text("'", path, "' has a damaged manifest; export it again")};
    }
    const std::string wrong = misfit(impl->manifest, weights);
    if (!wrong.empty()) return Error{Code::misfit, text("'", path, "' does not fit: ", wrong, ". Export it again")};
    try {
      register_ops();
    } catch (const std::exception& error) {
      return Error{Code::misfit, first_line(error)};
    }
    for (const char* name : {"state", "start", "step", "finish", "losses", "decide"})
      if (impl->manifest.guard > 0 || std::string(name) != "losses") impl->functions[name] = std::make_unique<Loader>(path, name);
    impl->initial = impl->run("state", {});
    for (const Tensor& tensor : impl->initial) impl->state.push_back(tensor.clone());
  } catch (const std::exception& error) {
    return Error{Code::bad_file, text("'", path, "' is damaged, or cannot be loaded here: ", first_line(error))};
  }
  return Session(std::move(impl));
}

Expected<Result> Session::adapt(const Images& images, const Options& options) {
  const auto begun = Clock::now();
  const std::string refusal = impl_->refusal(images, options);
  if (!refusal.empty()) return Error{Code::bad_argument, refusal};
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  try {
    return impl_->adapt(images, options, begun, false);
  } catch (const std::exception& error) {
    return Error{Code::failed, first_line(error)};
  }
}

Expected<double> Session::warm_up() {
  const Manifest& m = impl_->manifest;
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  try {
    const std::vector<float> grey(static_cast<size_t>(m.batch * 3 * m.height * m.width), 0.5f);
    double seconds = 0;
    for (int i = 0; i < 3; ++i) seconds = impl_->adapt({grey.data(), m.batch, 3, m.height, m.width}, {}, Clock::now(), true).seconds;
    return seconds;
  } catch (const std::exception& error) {
    return Error{Code::failed, first_line(error)};
  }
}

void Session::reset() {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  const c10::NoGradGuard no_gradients;
  at::_foreach_copy_(impl_->state, impl_->initial);
}

std::string Session::state() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  std::string found = impl_->label();
  for (const Tensor& tensor : impl_->state) {
    const Tensor plain = tensor.contiguous();
    found.append(static_cast<const char*>(plain.const_data_ptr()), plain.nbytes());
  }
  return found;
}

std::optional<Error> Session::restore(const std::string& state) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  if (!impl_->manifest.online) return Error{Code::bad_argument, "state belongs to an online package, and this one is episodic"};
  const std::string label = impl_->label();
  size_t size = label.size();
  for (const Tensor& tensor : impl_->state) size += tensor.nbytes();
  if (state.size() != size || state.compare(0, label.size(), label) != 0)
    return Error{Code::bad_argument, "state is not of this package; give what state() gave, under the same weights and config"};
  const c10::NoGradGuard no_gradients;
  const char* from = state.data() + label.size();
  for (Tensor& tensor : impl_->state) {
    Tensor plain = at::empty(tensor.sizes(), tensor.options());
    std::memcpy(plain.mutable_data_ptr(), from, plain.nbytes());
    tensor.copy_(plain);
    from += plain.nbytes();
  }
  return std::nullopt;
}

}  // namespace dtta
