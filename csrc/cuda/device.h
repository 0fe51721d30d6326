// The instructions that the kernels are made of, one function each. tests/cuda/sim.h defines the same names on the
// host.
#pragma once

#include <cstdint>

#ifdef EFFT_SIM
#include "sim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declares the dynamic shared memory under the name that a kernel gives it.
#define EFFT_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace efft::cuda {

// The number of blocks, one per multiprocessor, that run at the same time on an H100 or H200, and how many of them are
// certain to fit as clusters of four. Work is split by these constants on every GPU, so that results do not depend on
// the GPU.
constexpr int BLOCKS_AT_ONCE = 132, BLOCKS_IN_FOURS = 120;

// d += a @ b for one 16 x 8 x 16 product of a warp, of 16-bit numbers summed in float32 (mma.sync.m16n8k16).
// clang-format off: it would divide the text of the instruction
#define EFFT_MMA(type)                                                                                                 \
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {               \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "          \
        "{%0,%1,%2,%3};"                                                                                               \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                           \
  }
// clang-format on

struct Bf16 {
  static __device__ __forceinline__ float widen(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }
  static __device__ __forceinline__ uint16_t round(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  EFFT_MMA("bf16")
};

struct F16 {
  static __device__ __forceinline__ float widen(uint16_t v) { return __half2float(__ushort_as_half(v)); }
  static __device__ __forceinline__ uint16_t round(float v) { return __half_as_ushort(__float2half_rn(v)); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  EFFT_MMA("f16")
};

#undef EFFT_MMA

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Fills 16 bytes of shared memory with `bytes` bytes from `from`, which is aligned to 16 bytes, and zeros after them
// (cp.async.cg). The copy is complete after a cp_async_wait() and a barrier.
__device__ __forceinline__ void cp_async16(void* to, const void* from, int bytes) {
  const uint32_t at = shared_address(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last N groups that this thread committed (cp.async.wait_group).
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit numbers (ldmatrix.x4). Lanes 8 i to 8 i + 7 give the row addresses of matrix i.
// Lane l receives the elements (l / 4, 2 (l % 4) + {0, 1}) of each matrix, or of its transpose with TRANSPOSED
// (.trans).
template <bool TRANSPOSED>
__device__ __forceinline__ void ldmatrix(uint32_t (&f)[4], const uint16_t* row) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Synchronizes the lanes of a warp, including what they wrote to shared memory (bar.warp.sync).
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// The next kernel in the stream may start as soon as all blocks of this one have called launch_dependents()
// (griddepcontrol.launch_dependents, compute capability 9.0). Every kernel calls wait_for_prerequisites()
// (griddepcontrol.wait) before it touches memory that another kernel may read or write.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What every launch needs to know of its device. The answers never change, and asking the runtime for them takes
// microseconds, so each thread keeps them.
struct Device {
  int major, minor, multiprocessors;
};

// Sets `found` to the current device, and `index` to its number.
inline cudaError_t current_device(Device& found, int& index) {
  constexpr int KEPT = 16;
  thread_local Device kept[KEPT];
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess && index < KEPT && kept[index].major) {
    found = kept[index];
    return error;
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess && index < KEPT) kept[index] = found;
  return error;
}

// Allows a kernel its shared memory, once per thread and device unless two kernels meet in one place of the list.
inline cudaError_t allow_shared(const void* kernel, int device, int shared) {
  struct Allowed {
    const void* kernel;
    int device, shared;
  };
  constexpr size_t PLACES = 256;
  thread_local Allowed places[PLACES];
  Allowed& place = places[(reinterpret_cast<uintptr_t>(kernel) >> 4) % PLACES];
  if (place.kernel == kernel && place.device == device && place.shared == shared) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) place = {kernel, device, shared};
  return error;
}

// Returns null, or why the launch failed. `cluster` is the number of adjacent blocks that share memory (compute
// capability 9.0).
template <class Arguments>
const char* launch_clusters(void (*kernel)(Arguments), dim3 grid, int cluster, int threads, int shared, void* stream,
                            const Arguments& g) {
  Device device{};
  int index = 0;
  cudaError_t error = current_device(device, index);
  if (error == cudaSuccess) error = allow_shared(reinterpret_cast<const void*>(kernel), index, shared);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(unsigned(threads)), config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream), config.attrs = attributes;
  if (device.major >= 9) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    auto& size = attributes[config.numAttrs++].val.clusterDim;
    size.x = unsigned(cluster), size.y = 1, size.z = 1;
  }
  error = cudaLaunchKernelEx(&config, kernel, g);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared, void* stream, const Arguments& g) {
  return launch_clusters(kernel, grid, 1, threads, shared, stream, g);
}

}  // namespace efft::cuda

#endif
