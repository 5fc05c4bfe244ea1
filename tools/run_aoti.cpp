// Run a package of `tools/export.py --to aoti --keep-operators` in C++, without Python. Commands: docs/deploy.md.
//
//     run_aoti OPERATORS PACKAGE HEIGHT WIDTH IMAGE
//
// OPERATORS is overlock_mm/ops/_C.abi3.so. IMAGE holds 3 x HEIGHT x WIDTH float32, normalised. Every output is written
// to output0.bin, output1.bin, ..., as float32.

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_file.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: run_aoti OPERATORS PACKAGE HEIGHT WIDTH IMAGE\n";
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW)) {  // registers ContMix and the other operators
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const int64_t height = std::atoi(argv[3]), width = std::atoi(argv[4]);
  const at::Tensor image = at::from_file(argv[5], /*shared=*/false, 3 * height * width, at::kFloat);

  int count = 0;
  for (const at::Tensor& output : model.run({image.view({1, 3, height, width})})) {
    const at::Tensor values = output.contiguous();
    std::ofstream("output" + std::to_string(count++) + ".bin", std::ios::binary)
        .write(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
    std::cout << output.sizes() << '\n';
  }
}
