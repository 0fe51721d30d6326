// What bindings.cpp may launch. Shapes are comments; torch and CUDA headers stay out.
//
// All numbers in memory have one 16-bit type, sums are float32. Every launcher returns null, or why it failed.
#pragma once

#include <cstdint>
#include <limits>

namespace efft::cuda {

enum class Dtype { bf16, f16 };

// Makes a device, and a context of it, current for the launches of this thread: one that has run nothing yet has none.
const char* use_device(int32_t index);

constexpr int32_t UNGROUPED = std::numeric_limits<int32_t>::max();

// A matrix as the rows and columns in which it is copied to shared memory. Element (i, j) is at
//     (i / group) * outer + (i % group) * row + j * col
// elements. `group` lets two leading dimensions with separate strides serve as one dimension of rows.
struct Operand {
  const void* data = nullptr;
  int32_t row = 0, col = 0;
  int32_t group = UNGROUPED, outer = 0;
  bool vector = false;   // contiguous columns, rows aligned to 16 bytes: eight numbers are copied at a time
  bool k_major = false;  // rows are rows (or columns) of the result and columns the terms of its sums, or reversed
};

// y = [x | p] @ [w ; up] + bias, where p = x @ down is computed in the same launch and stored, or read if down is null.
//
// forward:  x, w = weight.T, down, up              backward:  x = dy, w = weight, down = up.T, up = down.T: y is dx
struct Linear {
  int32_t M = 0, N = 0, K = 0, R = 0;
  Operand x;                   // [M, K]
  Operand w;                   // [K, N]
  Operand down;                // [K, R], with at most 64 ranks
  Operand up;                  // [R, N]
  const void* bias = nullptr;  // [N], or null
  int32_t bias_stride = 0;
  void* p = nullptr;  // [M, R]
  int32_t p_row = 0;
  void* y = nullptr;  // [M, N]  contiguous
};

constexpr int LARGE_TILE = 128, SMALL_TILE = 64, MAX_RANK_BESIDE = 64;

// Compiling these takes longest, so each dtype has a separate source file.
const char* lowrank_linear_bf16(const Linear&, int32_t tile, void* stream);
const char* lowrank_linear_f16(const Linear&, int32_t tile, void* stream);

// The same for compute capability 9.0, with tiles of 128 rows and 128, 192 or 256 columns. Rows of every operand, of p
// if it is read, and of y are aligned to 16 bytes (Operand::vector); down and up are both k-major, or neither; the bias
// is contiguous and aligned to 4 bytes. p is computed in the same launch only with a k-major w.
constexpr int HOPPER_RANK_BESIDE = 32;

const char* hopper_linear_bf16(const Linear&, int32_t tile, void* stream);
const char* hopper_linear_f16(const Linear&, int32_t tile, void* stream);

// c = scale * a @ b, or with `adds` c += scale * a @ b.
struct Product {
  int32_t M = 0, N = 0, K = 0;
  float scale = 1;
  Operand a;          // [M, K]
  Operand b;          // [K, N]
  void* c = nullptr;  // [M, N]
  int32_t c_row = 0, c_col = 1;
  bool adds = false;
  int32_t first_tile = 0;  // set by products()
};

// Launches all of the products, up to 256 in one launch.
const char* products(Dtype, Product*, int32_t count, void* stream);

// The pass over dy, in runs of `rows` rows and chunks of `columns()` columns:
//
//     dup_slots[run] = p.T @ dy  of the rows of the run        dp_slots[chunk] = dy @ up.T  of the columns of the chunk
//
// With a single run (chunk) the slot is the 16-bit result; otherwise slots are float32, and reduce() sums them.
struct DyPass {
  int32_t M = 0, N = 0, R = 0, rows = 0;
  Operand dy;                 // [M, N]  columns n
  Operand up;                 // [R, N]  columns n; no dp if its data is null
  Operand p;                  // [M, R]  columns r
  void* dp_slots = nullptr;   // [chunks, M, R]  contiguous
  void* dup_slots = nullptr;  // [runs, R, N], element (r, n) at r * dup_row + n * dup_col
  int32_t dup_row = 0, dup_col = 0;
  int32_t dp_row = 0;  // hopper_pass() only: numbers from one row of dp to the next
};

// The columns of a chunk and the rows of a tile.
int32_t dy_pass_columns(int32_t R);
constexpr int DY_PASS_ROWS = 64;

const char* dy_pass(Dtype, const DyPass&, void* stream);

// The same for compute capability 9.0 and up to 32 ranks. Rows of dy, up and p are aligned to 16 bytes
// (Operand::vector).
//
//     dp_slots = dp, 16-bit, complete        dup_slots = a slot for each run, which reduce() sums (Reduction::ranks)
//
// The plan splits the work among blocks: `parts` blocks across the columns, each with `tiles` tiles of 64 columns, and
// `runs` runs of `rows` rows. With dp and one part, each of the HOPPER_PASS_WORKERS warpgroups of a block has a run.
// The plan follows from the shape alone, so that results do not depend on the GPU.
constexpr int32_t HOPPER_PASS_RANK = 32, HOPPER_PASS_ROWS = 64, HOPPER_PASS_COLUMNS = 64, HOPPER_PASS_WORKERS = 2;

struct HopperPassPlan {
  int32_t tiles = 0, parts = 0, runs = 0, rows = 0;
  int32_t ranks = 0;  // ranks of an accumulator, 16 or 32
  int64_t slot() const { return int64_t(parts) * tiles * HOPPER_PASS_COLUMNS * ranks; }  // numbers of a slot
};

// Returns a plan without tiles where the kernel does not take the shape.
HopperPassPlan plan_hopper_pass(int32_t M, int32_t N, int32_t R, bool dp);

const char* hopper_pass_bf16(const DyPass&, const HopperPassPlan&, void* stream);
const char* hopper_pass_f16(const DyPass&, const HopperPassPlan&, void* stream);

// out = sum of slots, rounded. The order of the sum follows from `count` alone.
struct Reduction {
  const float* slots = nullptr;  // [count, size]
  void* out = nullptr;           // [size], or as row and col say
  int64_t size = 0;
  int32_t count = 0;
  // For slots of hopper_pass(): accumulators of this many ranks, whose element (n, r) is stored at out[n * col + r *
  // row].
  int32_t ranks = 0, N = 0, R = 0, row = 0, col = 0;
};

// Both sums are computed in one launch; the second may be empty.
struct Reductions {
  Reduction of[2];
};

const char* reduce(Dtype, const Reductions&, void* stream);

}  // namespace efft::cuda
