// A program without Python that runs a model of AOTInductor's. The library is linked for its
// operators alone; no function of it is called.
//
//   run_package PACKAGE SEED INPUTS OUTPUTS     INPUTS and OUTPUTS: of torch.save and torch.load
#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s PACKAGE SEED INPUTS OUTPUTS\n", argv[0]);
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);

  std::ifstream file(argv[3], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)),
                                std::istreambuf_iterator<char>());
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& value : torch::jit::pickle_load(bytes).toList()) {
    inputs.push_back(value.toTensor());
  }

  const c10::InferenceMode inference;
  at::manual_seed(std::stoull(argv[2]));
  // Twice: the second call goes on with the generator, as it would in Python.
  std::vector<at::Tensor> outputs = model.run(inputs);
  for (const at::Tensor& y : model.run(inputs)) outputs.push_back(y);

  // As a tuple: torch.load refuses the typed list of TorchScript's.
  const std::vector<char> saved = torch::jit::pickle_save(
      c10::ivalue::Tuple::create(std::vector<c10::IValue>(outputs.begin(), outputs.end())));
  std::ofstream(argv[4], std::ios::binary).write(saved.data(), saved.size());
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
