// Where the kernels of an instruction set are found: in tables of functions, Kernels<T> (contmix_cpu.h) and
// MapKernels<T> (maps_cpu.h), for float and double.
#pragma once

namespace overlock_mm::cpu {

namespace baseline {
template <typename Table>
const Table& table();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename Table>
const Table& table();
}
namespace avx512 {
template <typename Table>
const Table& table();
}
#endif

}  // namespace overlock_mm::cpu
