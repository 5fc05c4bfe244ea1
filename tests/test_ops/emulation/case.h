// Cases that the emulation runs: read from a file, results written to another. A program for each operator includes it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

namespace cuda_emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(2);
}

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) fail("no case");
  }
  ~Reader() { std::fclose(file_); }

  int64_t number() {
    int64_t number = 0;
    if (std::fread(&number, sizeof(number), 1, file_) != 1) fail("the case ends too early");
    return number;
  }

  /// A size and as many bytes, in an allocation of just that size. No bytes are null.
  void* bytes(int64_t* size) {
    *size = number();
    if (*size == 0) return nullptr;
    void* data = std::malloc(static_cast<size_t>(*size));
    if (std::fread(data, 1, static_cast<size_t>(*size), file_) != static_cast<size_t>(*size))
      fail("the case ends too early");
    return data;
  }

 private:
  FILE* file_;
};

struct Array {
  int64_t size = 0;  // in bytes
  void* data = nullptr;

  Array() = default;
  explicit Array(Reader& reader) { data = reader.bytes(&size); }
  explicit Array(int64_t size) : size(size), data(std::malloc(static_cast<size_t>(size))) {
    std::memset(data, 0xff, static_cast<size_t>(size));  // NaN
  }
  Array(Array&& other) noexcept : size(other.size), data(other.data) { other.data = nullptr; }
  Array& operator=(Array&& other) noexcept {
    std::swap(data, other.data);
    std::swap(size, other.size);
    return *this;
  }
  ~Array() { std::free(data); }
};

class Writer {
 public:
  explicit Writer(const char* path) : file_(std::fopen(path, "wb")) {
    if (!file_) fail("no result");
  }
  ~Writer() { std::fclose(file_); }

  void write(const void* data, int64_t size) {
    std::fwrite(&size, sizeof(size), 1, file_);
    if (size) std::fwrite(data, 1, static_cast<size_t>(size), file_);
  }

 private:
  FILE* file_;
};

/// A case of numbers and arrays, which the kernels read and write. (An array without bytes is null.) The file has the
/// limit of shared memory and the order of threads, then the numbers, then the arrays, each after their number.
struct Case {
  std::vector<int64_t> numbers;
  std::vector<Array> arrays;

  explicit Case(const char* path) {
    Reader reader(path);
    device().shared_memory_limit = static_cast<int>(reader.number());
    device().reversed = reader.number() != 0;
    device().counts_reads = true;
    numbers.resize(static_cast<size_t>(reader.number()));
    for (int64_t& number : numbers) number = reader.number();
    for (int64_t count = reader.number(); count > 0; --count) arrays.emplace_back(reader);
  }

  /// All arrays, and the launches.
  void write(const char* path) const {
    Writer writer(path);
    for (const Array& array : arrays) writer.write(array.data, array.size);
    writer.write(device().launches.data(), static_cast<int64_t>(device().launches.size()));
  }
};

/// main() of a program: `launch` reads a case and returns CUDA's error.
template <typename Launch>
int run_case(int count, char** arguments, const Launch& launch) {
  if (count != 3) fail("usage: run_... CASE RESULT");
  Case the_case(arguments[1]);
  if (launch(the_case) != cudaSuccess) fail("a kernel was not launched");
  the_case.write(arguments[2]);
  return 0;
}

}  // namespace cuda_emulation
