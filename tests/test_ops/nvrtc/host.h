// Enough of the host's headers for NVRTC, which compiles for devices alone and has none: all names of headers that the
// sources in csrc/cuda include mean this one. Functions of the host compile as functions of a device that nobody calls,
// so that their launches say which kernels there are.
#ifndef OVERLOCK_MM_NVRTC_HOST
#define OVERLOCK_MM_NVRTC_HOST

using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;

#define FLT_MAX 3.402823466e+38F
#define DBL_MAX 1.7976931348623158e+308
#define INFINITY __int_as_float(0x7f800000)

namespace std {

template <typename T, T kValue>
struct integral_constant {
  static constexpr T value = kValue;
  constexpr operator T() const { return kValue; }
};
template <typename A, typename B>
struct is_same : integral_constant<bool, false> {};
template <typename A>
struct is_same<A, A> : integral_constant<bool, true> {};
template <typename A, typename B>
inline constexpr bool is_same_v = is_same<A, B>::value;
template <typename T>
struct remove_pointer {
  using type = T;
};
template <typename T>
struct remove_pointer<T*> {
  using type = T;
};
template <typename T>
using remove_pointer_t = typename remove_pointer<T>::type;

template <typename T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <typename T>
constexpr const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}

}  // namespace std

// NVRTC knows the runtime's types, and what of it is for devices too.
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int);
template <typename Kernel>
cudaError_t cudaLaunchKernel(Kernel*, dim3, dim3, void**, size_t, cudaStream_t);

#endif
