// The instructions of compute capability 9.0 that hopper.h and hopper_pass.h are made of, one function each.
// tests/cuda/sim_hopper.h defines the same names on the host.
//
// Addresses of shared memory are 32 bits here; map_shared() gives those of another block of the cluster.
#pragma once

#include "device.h"

#ifdef EFFT_SIM
#include "sim_hopper.h"
#else

#include <cuda.h>

// These instructions compile for sm_90a only; for other architectures the kernels are empty and never launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EFFT_HOPPER
#endif

namespace efft::cuda {

using TensorMap = CUtensorMap;

// Barriers count arrivals and bytes; their phase flips when all of them have arrived (mbarrier.init).
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes barriers that were initialized before this visible to TMA and the other blocks (fence.mbarrier_init).
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the phase wait for this many more bytes (mbarrier.arrive.expect_tx).
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the barrier that block `rank` of the cluster has at the same offset (mapa, mbarrier.arrive). The default
// semantics order accesses by TMA and the tensor cores; plain stores to another block would need .release.cluster, a
// fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 at;\n"
      "mapa.shared::cluster.u32 at, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [at];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is over (mbarrier.try_wait.parity).
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Does the same, and plain reads that follow see what other blocks of the cluster wrote before
// (mbarrier.try_wait.parity.acquire.cluster).
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Synchronizes `threads` threads of the block, in whole warps (bar.sync); id is 1 to 15.
__device__ __forceinline__ void group_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives at the same barrier without waiting for the others (bar.arrive).
__device__ __forceinline__ void group_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The rank of this block in its cluster (%cluster_ctarank).
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Synchronizes all threads of all blocks of the cluster (barrier.cluster.arrive, barrier.cluster.wait).
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();  // The lanes of a warp arrive together.
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Maps an address to the shared memory of block `rank` of the cluster (mapa).
__device__ __forceinline__ uint32_t map_shared(uint32_t address, int rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Stores 16 bytes to any block of the cluster, counted by a barrier of that block (st.async); both addresses are
// mapped.
__device__ __forceinline__ void store_async(uint32_t to, const float* v, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

// Sets the registers per thread from now on, for all threads of a warpgroup (setmaxnreg.inc, setmaxnreg.dec).
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Prefetches the descriptor that TMA needs (prefetch.tensormap).
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies a box of the matrix, from (row, col) on, by TMA; beyond the ends of the matrix it is zero, and the barrier
// counts its bytes (cp.async.bulk.tensor.2d, to shared memory).
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Copies the same box to one offset in all blocks of `mask`, and counts at the barrier of each (cp.async.bulk.tensor.2d
// with .multicast::cluster).
__device__ __forceinline__ void tma_load_all(uint32_t to, const TensorMap* map, int col, int row, uint64_t* barrier,
                                             int mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(col), "r"(row), "r"(shared_address(barrier)), "h"(uint16_t(mask))
      : "memory");
}

// Copies a box back to the matrix, except for what is beyond its ends (cp.async.bulk.tensor.2d, to global memory). The
// caller commits (cp.async.bulk.commit_group).
__device__ __forceinline__ void tma_store(const TensorMap* map, uint32_t from, int col, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(col),
               "r"(row), "r"(from)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the last N groups of stores of this thread have read shared memory
// (cp.async.bulk.wait_group.read).
template <int N>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Stores four 8 x 8 matrices of 16-bit numbers (stmatrix.x4). Lanes 8 i to 8 i + 7 give the row addresses of matrix i;
// lane l holds the elements (l / 4, 2 (l % 4) + {0, 1}) of each matrix.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
// Makes what this thread stored to shared memory visible to TMA (fence.proxy.async).
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The functions below wrap wgmma: matmuls of a warpgroup whose operands stay in shared memory.

// Orders earlier accesses to registers and shared memory before the matmuls that follow (wgmma.fence). wgmma_commit()
// closes a group of matmuls (wgmma.commit_group).
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the last N groups are done (wgmma.wait_group).
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving accesses to these registers across this line: it does not see that a matmul in flight
// still changes them.
template <int COUNT>
__device__ __forceinline__ void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void hold(uint32_t (&a)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

template <class T, int N>
struct Wgmma;

#define EFFT_8(i)                                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define EFFT_F8 EFFT_8(0)
#define EFFT_F16 EFFT_F8, EFFT_8(8)
#define EFFT_F24 EFFT_F16, EFFT_8(16)
#define EFFT_F32 EFFT_F24, EFFT_8(24)
#define EFFT_F40 EFFT_F32, EFFT_8(32)
#define EFFT_F48 EFFT_F40, EFFT_8(40)
#define EFFT_F56 EFFT_F48, EFFT_8(48)
#define EFFT_F64 EFFT_F56, EFFT_8(56)
#define EFFT_F72 EFFT_F64, EFFT_8(64)
#define EFFT_F80 EFFT_F72, EFFT_8(72)
#define EFFT_F88 EFFT_F80, EFFT_8(80)
#define EFFT_F96 EFFT_F88, EFFT_8(88)
#define EFFT_F104 EFFT_F96, EFFT_8(96)
#define EFFT_F112 EFFT_F104, EFFT_8(104)
#define EFFT_F120 EFFT_F112, EFFT_8(112)
#define EFFT_F128 EFFT_F120, EFFT_8(120)
#define EFFT_D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define EFFT_D16 EFFT_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define EFFT_D24 EFFT_D16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define EFFT_D32 EFFT_D24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define EFFT_D40 EFFT_D32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define EFFT_D48 EFFT_D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define EFFT_D56 EFFT_D48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define EFFT_D64 EFFT_D56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define EFFT_D72 EFFT_D64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define EFFT_D80 EFFT_D72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define EFFT_D88 EFFT_D80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define EFFT_D96 EFFT_D88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define EFFT_D104 EFFT_D96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define EFFT_D112 EFFT_D104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define EFFT_D120 EFFT_D112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define EFFT_D128 EFFT_D120 ",%120,%121,%122,%123,%124,%125,%126,%127"

// d [64, N] (+)= a [64, 16] @ b [16, N] (wgmma.mma_async), with REGS = N / 2 registers of d and the operands after
// them.
//   shared     a and b by descriptors, a k-major; d is overwritten unless `add`
//   registers  a in registers
#define EFFT_WGMMA(T, TYPE, N, REGS, O0, O1, O2, O3, O4, O5)                                                 \
  template <>                                                                                                \
  struct Wgmma<T, N> {                                                                                       \
    template <bool B_K_MAJOR>                                                                                \
    static __device__ __forceinline__ void shared(float (&d)[REGS], uint64_t a, uint64_t b, int add) {       \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" O2                                               \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" EFFT_D##REGS         \
                   "}, %" O0 ", %" O1 ", add, 1, 1, 0, %" O3 ";\n}"                                          \
                   : EFFT_F##REGS                                                                            \
                   : "l"(a), "l"(b), "r"(add), "n"(int(!B_K_MAJOR)));                                        \
    }                                                                                                        \
    template <bool B_K_MAJOR>                                                                                \
    static __device__ __forceinline__ void registers(float (&d)[REGS], const uint32_t (&a)[4], uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" EFFT_D##REGS         \
                   "}, {%" O0 ", %" O1 ", %" O2 ", %" O3 "}, %" O4 ", 1, 1, 1, %" O5 ";"                     \
                   : EFFT_F##REGS                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(!B_K_MAJOR)));              \
    }                                                                                                        \
  };

#define EFFT_WGMMAS(T, TYPE)                                              \
  EFFT_WGMMA(T, TYPE, 16, 8, "8", "9", "10", "11", "12", "13")            \
  EFFT_WGMMA(T, TYPE, 32, 16, "16", "17", "18", "19", "20", "21")         \
  EFFT_WGMMA(T, TYPE, 96, 48, "48", "49", "50", "51", "52", "53")         \
  EFFT_WGMMA(T, TYPE, 112, 56, "56", "57", "58", "59", "60", "61")        \
  EFFT_WGMMA(T, TYPE, 128, 64, "64", "65", "66", "67", "68", "69")        \
  EFFT_WGMMA(T, TYPE, 144, 72, "72", "73", "74", "75", "76", "77")        \
  EFFT_WGMMA(T, TYPE, 160, 80, "80", "81", "82", "83", "84", "85")        \
  EFFT_WGMMA(T, TYPE, 192, 96, "96", "97", "98", "99", "100", "101")      \
  EFFT_WGMMA(T, TYPE, 208, 104, "104", "105", "106", "107", "108", "109") \
  EFFT_WGMMA(T, TYPE, 224, 112, "112", "113", "114", "115", "116", "117") \
  EFFT_WGMMA(T, TYPE, 256, 128, "128", "129", "130", "131", "132", "133")

EFFT_WGMMAS(Bf16, "bf16")
EFFT_WGMMAS(F16, "f16")

#undef EFFT_WGMMAS
#undef EFFT_WGMMA

// wgmma.mma_async with both operands transposed: a is [16 terms, 64 rows] and b is [16 terms, N] in shared memory.
// d [64, N] += a.T @ b
template <class T, int N>
struct WgmmaTransposed;

#define EFFT_WGMMA_TRANSPOSED(T, TYPE, N, REGS, O0, O1)                                              \
  template <>                                                                                        \
  struct WgmmaTransposed<T, N> {                                                                     \
    static __device__ __forceinline__ void shared(float (&d)[REGS], uint64_t a, uint64_t b) {        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" EFFT_D##REGS \
                   "}, %" O0 ", %" O1 ", 1, 1, 1, 1, 1;"                                             \
                   : EFFT_F##REGS                                                                    \
                   : "l"(a), "l"(b));                                                                \
    }                                                                                                \
  };

EFFT_WGMMA_TRANSPOSED(Bf16, "bf16", 16, 8, "8", "9")
EFFT_WGMMA_TRANSPOSED(Bf16, "bf16", 32, 16, "16", "17")
EFFT_WGMMA_TRANSPOSED(F16, "f16", 16, 8, "8", "9")
EFFT_WGMMA_TRANSPOSED(F16, "f16", 32, 16, "16", "17")

#undef EFFT_WGMMA_TRANSPOSED

// Describes to TMA how boxes of a matrix of 16-bit numbers are copied. Returns null, or why it cannot.
inline const char* make_map(TensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                            int box_rows, int box_cols, int swizzle_bytes) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    // The driver's function is looked up at run time, because the library is built and loaded without a driver too.
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return "this driver has no tensor maps";
  const cuuint64_t sizes[] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[] = {cuuint64_t(row_stride) * 2};
  const cuuint32_t box[] = {cuuint32_t(box_cols), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUtensorMapSwizzle swizzle = swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  // TMA copies the bits of 16-bit numbers, so bfloat16 serves for both dtypes.
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "a tensor map was refused";
}

// Returns the multiprocessors of the current device, or 0 if it is not of compute capability 9.0.
inline int multiprocessors() {
  Device device{};
  int index = 0;
  const bool known = current_device(device, index) == cudaSuccess && device.major == 9 && device.minor == 0;
  return known ? device.multiprocessors : 0;
}

}  // namespace efft::cuda

#endif
