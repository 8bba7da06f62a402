#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/topk.h>
#include <dlfcn.h>
#include <dtta_ops.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

int32_t type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DTTA_FLOAT32;
    case at::kBFloat16: return DTTA_BFLOAT16;
    case at::kHalf: return DTTA_FLOAT16;
    default: TORCH_CHECK(false, "a tensor is ", tensor.scalar_type(), "; the kernels take float32, bfloat16 and float16");
  }
}

void ran(int code) {
  TORCH_CHECK(code != DTTA_BAD_TIMESTEP, "timesteps has values outside the table");
  TORCH_CHECK(code != DTTA_BAD_IMAGE_ID, "image_ids has values outside 0 .. 2^32 - 1");
  TORCH_CHECK(code == DTTA_OK, "libdtta_kernels refused the call with code ", code, "; dtta_ops.h names it");
}

/* The draws of a call, with the contiguous tensors that they point to. */
struct Draws {
  Tensor x0, table, timesteps, image_ids, noise;
  dtta_draws c{};

  Draws(const Tensor& x0_, const Tensor& table_, const Tensor& timesteps_, const Tensor& ids_, int64_t seed, const Tensor& step, int64_t pair0,
        const MaybeTensor& noise_)
      : x0(x0_.contiguous()), table(table_.contiguous()), timesteps(timesteps_.contiguous()), image_ids(ids_.contiguous()) {
    if (noise_.has_value()) noise = noise_->contiguous();
    c.x0 = x0.const_data_ptr();
    c.table = table.const_data_ptr<float>();
    c.timesteps = timesteps.const_data_ptr<int64_t>();
    c.image_ids = image_ids.const_data_ptr<int64_t>();
    c.noise = noise.defined() ? noise.const_data_ptr() : nullptr;
    c.table_rows = table.size(0);
    c.images = timesteps.size(0);
    c.pairs = timesteps.size(1);
    c.elements = x0.numel() / x0.size(0);
    c.step = step.item<int64_t>();
    c.pair0 = pair0;
    c.seed = static_cast<uint64_t>(seed);
    c.x0_type = type_of(x0);
    c.noise_type = noise.defined() ? type_of(noise) : DTTA_FLOAT32;
  }

  std::vector<int64_t> rows() const {
    auto shape = x0.sizes().vec();
    shape[0] = c.images * c.pairs;
    return shape;
  }
};

Tensor add_noise(const Tensor& x0, const Tensor& table, const Tensor& timesteps, const Tensor& image_ids, int64_t seed, const Tensor& step,
                 int64_t pair0, at::ScalarType dtype, const MaybeTensor& noise) {
  const Draws draws(x0, table, timesteps, image_ids, seed, step, pair0, noise);
  Tensor x_t = at::empty(draws.rows(), x0.options().dtype(dtype));
  ran(dtta_add_noise(&draws.c, x_t.mutable_data_ptr(), type_of(x_t), at::get_num_threads()));
  return x_t;
}

std::tuple<Tensor, Tensor> loss_of(const Tensor& prediction_, const Draws& draws, bool l1, const MaybeTensor& upstream_) {
  const Tensor prediction = prediction_.contiguous();
  const Tensor upstream = upstream_.has_value() ? upstream_->to(at::kFloat).contiguous() : Tensor();
  Tensor loss = at::empty({draws.c.images, draws.c.pairs}, prediction.options().dtype(at::kFloat)), gradient;
  if (upstream.defined()) gradient = at::empty_like(prediction);
  const int64_t stride = prediction.numel() / prediction.size(0);
  ran(dtta_denoising_loss(&draws.c, prediction.const_data_ptr(), type_of(prediction), stride, l1, loss.mutable_data_ptr<float>(),
                          upstream.defined() ? upstream.const_data_ptr<float>() : nullptr,
                          gradient.defined() ? gradient.mutable_data_ptr() : nullptr, stride, at::get_num_threads()));
  return {loss, gradient};
}

Tensor denoising_loss(const Tensor& prediction, const Tensor& x0, const Tensor& table, const Tensor& timesteps, const Tensor& image_ids,
                      int64_t seed, const Tensor& step, int64_t pair0, bool l1, const MaybeTensor& noise) {
  return std::get<0>(loss_of(prediction, Draws(x0, table, timesteps, image_ids, seed, step, pair0, noise), l1, std::nullopt));
}

std::tuple<Tensor, Tensor> denoising_loss_and_gradient(const Tensor& prediction, const Tensor& x0, const Tensor& table, const Tensor& timesteps,
                                                       const Tensor& image_ids, int64_t seed, const Tensor& step, int64_t pair0, bool l1,
                                                       const Tensor& upstream, const MaybeTensor& noise) {
  return loss_of(prediction, Draws(x0, table, timesteps, image_ids, seed, step, pair0, noise), l1, upstream);
}

dtta_mixture mixture_of(const Tensor& logits, const Tensor& embeddings, const Tensor& chosen, std::optional<double> logit_scale, bool per_image) {
  dtta_mixture c{};
  c.logits = logits.const_data_ptr();
  c.embeddings = embeddings.const_data_ptr();
  const bool some = chosen.defined() && chosen.size(1) > 0;
  c.chosen = some ? chosen.const_data_ptr<int64_t>() : nullptr;
  c.images = logits.size(0);
  c.classes = logits.size(1);
  c.numbers = embeddings.numel() / embeddings.size(0) / (per_image ? embeddings.size(1) : 1);
  c.count = some ? chosen.size(1) : 0;
  c.logit_scale = logit_scale.value_or(0.0);
  c.logits_type = type_of(logits);
  c.embeddings_type = type_of(embeddings);
  c.per_image = per_image;
  return c;
}

std::tuple<Tensor, Tensor, Tensor> mix_condition(const Tensor& logits_, const Tensor& embeddings_, std::optional<int64_t> top_k,
                                                 std::optional<double> logit_scale, bool per_image) {
  const Tensor logits = logits_.contiguous(), embeddings = embeddings_.contiguous();
  const Tensor chosen = top_k.has_value() ? std::get<1>(at::topk(logits, *top_k, 1)).contiguous()
                                          : at::empty({logits.size(0), 0}, logits.options().dtype(at::kLong));
  const dtta_mixture mixture = mixture_of(logits, embeddings, chosen, logit_scale, per_image);
  auto shape = embeddings.sizes().slice(per_image ? 2 : 1).vec();
  shape.insert(shape.begin(), logits.size(0));
  Tensor mixed = at::empty(shape, embeddings.options()), weights = at::empty(logits.sizes(), logits.options().dtype(at::kFloat));
  ran(dtta_mix_condition(&mixture, weights.mutable_data_ptr<float>(), mixed.mutable_data_ptr(), at::get_num_threads()));
  return {mixed, weights, chosen};
}

std::tuple<Tensor, Tensor> mix_condition_backward(const Tensor& upstream_, const Tensor& logits_, const Tensor& embeddings_, const Tensor& weights_,
                                                  const Tensor& chosen_, std::optional<double> logit_scale, bool per_image,
                                                  bool with_embeddings) {
  const Tensor upstream = upstream_.contiguous(), logits = logits_.contiguous(), embeddings = embeddings_.contiguous();
  const Tensor weights = weights_.contiguous(), chosen = chosen_.contiguous();
  const dtta_mixture mixture = mixture_of(logits, embeddings, chosen, logit_scale, per_image);
  Tensor to_logits = at::empty_like(logits);
  Tensor to_embeddings = with_embeddings ? at::empty_like(embeddings) : at::empty({0}, embeddings.options());
  ran(dtta_mix_condition_backward(&mixture, upstream.const_data_ptr(), weights.const_data_ptr<float>(), to_logits.mutable_data_ptr(),
                                  with_embeddings ? to_embeddings.mutable_data_ptr() : nullptr, at::get_num_threads()));
  return {to_logits, to_embeddings};
}

/* As kernels/schema.py declares them. */
void define(torch::Library& library) {
  const auto schema = [](const std::string& text) { return torch::schema(text.c_str()); };
  const std::string draws = "Tensor x0, Tensor table, Tensor timesteps, Tensor image_ids, int seed, Tensor step, int pair0";
  const std::string mixture = "float? logit_scale, bool per_image";
  library.def(schema("add_noise(" + draws + ", ScalarType dtype, Tensor? noise) -> Tensor"));
  library.def(schema("denoising_loss(Tensor prediction, " + draws + ", bool l1, Tensor? noise) -> Tensor"));
  library.def(schema("denoising_loss_and_gradient(Tensor prediction, " + draws + ", bool l1, Tensor upstream, Tensor? noise) -> (Tensor, Tensor)"));
  library.def(schema("mix_condition(Tensor logits, Tensor embeddings, int? top_k, " + mixture + ") -> (Tensor, Tensor, Tensor)"));
  library.def(schema("mix_condition_backward(Tensor upstream, Tensor logits, Tensor embeddings, Tensor weights, Tensor chosen, " + mixture +
              ", bool with_embeddings) -> (Tensor, Tensor)"));
  library.impl("add_noise", torch::dispatch(c10::DispatchKey::CPU, add_noise));
  library.impl("denoising_loss", torch::dispatch(c10::DispatchKey::CPU, denoising_loss));
  library.impl("denoising_loss_and_gradient", torch::dispatch(c10::DispatchKey::CPU, denoising_loss_and_gradient));
  library.impl("mix_condition", torch::dispatch(c10::DispatchKey::CPU, mix_condition));
  library.impl("mix_condition_backward", torch::dispatch(c10::DispatchKey::CPU, mix_condition_backward));
}

}  // namespace

void dtta::register_ops() {
  static std::mutex mutex;
  static torch::Library* library = nullptr;  // torch takes ops back when it is destroyed: never
  const std::lock_guard<std::mutex> lock(mutex);
  if (library != nullptr || c10::Dispatcher::singleton().findSchema({"dtta_fast::add_noise", ""}).has_value()) return;
  const int64_t abi = int64_t{1000000} * DTTA_ABI_VERSION + int64_t{1000} * static_cast<int64_t>(sizeof(dtta_draws)) +
                      static_cast<int64_t>(sizeof(dtta_mixture));
  TORCH_CHECK(dtta_abi() == abi, "libdtta_kernels has ABI ", dtta_abi(), " and this host was built for ", abi, ": build it again");
  // torch's OpenMP threads: two pools would spin against each other on the same cores
  dtta_use_thread_pool(reinterpret_cast<dtta_thread_pool>(dlsym(RTLD_DEFAULT, "GOMP_parallel")));
  library = new torch::Library(torch::Library::FRAGMENT, "dtta_fast", std::nullopt, __FILE__, __LINE__);
  define(*library);
}
