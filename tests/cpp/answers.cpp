// Prints what each op of the native library gives for fixed inputs, a number a line, so that builds for two processors can be compared.
// The words of Philox4x32-10 are held to those that Salmon et al. published (SC 2011, kat_vectors of Random123).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dtta_ops.h"

namespace {

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "answers: %s\n", what);
  std::exit(1);
}

std::vector<float> numbers(int count, int seed) {
  std::vector<float> found(count);
  for (int i = 0; i < count; ++i) found[i] = static_cast<float>((i * 37 + seed * 101) % 64) / 32.0f - 1.0f;
  return found;
}

void print(const std::vector<float>& values) {
  for (const float value : values) {
    expect(std::isfinite(value), "a number is not finite");
    std::printf("%.9g\n", value);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) expect(dtta_use_instruction_set(arguments[1]) == DTTA_OK, "there is no such instruction set");
  std::fprintf(stderr, "%s\n", dtta_instruction_set());

  const uint32_t counters[12] = {0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u, 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
  const uint32_t keys[6] = {0, 0, ~0u, ~0u, 0xa4093822, 0x299f31d0};
  const uint32_t published[12] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8, 0x408f276d, 0x41c83b0e,
                                  0xa20bc7c6, 0x6d5451fd, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  for (int i = 0; i < 3; ++i) {
    uint32_t words[4];
    dtta_philox4x32_10(counters + 4 * i, keys + 2 * i, 1, words);
    for (int k = 0; k < 4; ++k) expect(words[k] == published[4 * i + k], "a word is not the published one");
  }

  constexpr int images = 2, pairs = 3, elements = 75, rows = images * pairs;
  const auto x0 = numbers(images * elements, 1), prediction = numbers(rows * elements, 2), upstream = numbers(rows, 3);
  const float table[10] = {0.9f, 0.435889894f, 0, 1, 1, 0.3f, 0.953939201f, -0.953939201f, 0.3f, 0.7f};
  const int64_t timesteps[rows] = {0, 1, 0, 1, 1, 0}, ids[images] = {4, 4294967295};
  dtta_draws draws{x0.data(), table, timesteps, ids, nullptr, 2, images, pairs, elements, 2, 5, 1099511627899u, DTTA_FLOAT32, DTTA_FLOAT32};
  std::vector<float> x_t(rows * elements), loss(rows), gradient(rows * elements);
  expect(dtta_add_noise(&draws, x_t.data(), DTTA_FLOAT32, 2) == DTTA_OK, "add_noise failed");
  print(x_t);
  for (const int32_t l1 : {0, 1}) {
    expect(dtta_denoising_loss(&draws, prediction.data(), DTTA_FLOAT32, elements, l1, loss.data(), upstream.data(), gradient.data(), elements,
                               2) == DTTA_OK,
           "denoising_loss failed");
    print(loss);
    print(gradient);
  }

  constexpr int classes = 11, width = 37;
  const auto logits = numbers(images * classes, 4), embeddings = numbers(classes * width, 5), back = numbers(images * width, 6);
  const dtta_mixture mixture{logits.data(), embeddings.data(), nullptr, images, classes, width, 0, 3.0, DTTA_FLOAT32, DTTA_FLOAT32, 0};
  std::vector<float> weights(images * classes), mixed(images * width), to_logits(images * classes), to_embeddings(classes * width);
  expect(dtta_mix_condition(&mixture, weights.data(), mixed.data(), 2) == DTTA_OK, "mix_condition failed");
  expect(dtta_mix_condition_backward(&mixture, back.data(), weights.data(), to_logits.data(), to_embeddings.data(), 2) == DTTA_OK,
         "mix_condition_backward failed");
  for (const auto& found : {weights, mixed, to_logits, to_embeddings}) print(found);
}
