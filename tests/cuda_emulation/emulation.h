// A CUDA device on the CPU, for tests: what the headers in include/ and instructions.cpp give kernels their meaning with.
//
// Every thread of a block is a fiber with a stack of its own; one runs at a time, and another takes over where it has to
// wait: at a barrier, or at an instruction that a warp executes together. Blocks run one after the other. The order of
// threads, warps and blocks follows a seed: 0 is ascending, others shuffle it.
//
// Kernels are compiled with g++ -fsanitize=thread, but linked with this library in place of ThreadSanitizer's: the compiler
// puts a call before every load and store, and the calls end in memory.cpp, which knows every byte that a kernel may touch:
//   outside of what the launch was given, or misaligned for its width          -> error
//   shared memory that nothing in this block has written, or that a cp.async is still to write       -> error
//   two threads, at least one of them writing, without a barrier (or __syncwarp) between them        -> error, even if
//     this order of threads gives the right result; between blocks of a launch there is no barrier
// An error ends the launch; last_error() says who did what where. A warp instruction does not order memory.
//
// Not modelled: the speed of anything (but bank conflicts of ldmatrix are counted), atomics, texture and constant memory,
// static __shared__ variables, more than one stream, the memory model between launches (they are sequential).
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr size_t kMostSharedBytes = 99 * 1024;  // of a block on sm_86 and sm_89, the least of all targets
constexpr unsigned kLanes = 32;

enum class Access { read, write };

// ---- for the host ----

// Runs `body` as every thread of every block. Returns 0, or an error code: then last_error() tells.
int launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void* context), const void* context);

// Memory that kernels may read and write. What overlaps becomes one region.
void allow(const void* begin, size_t bytes, const char* name);
void forget_all();

const char* last_error();  // "" if the last launch had none
void set_order(uint64_t seed);

struct Counts {
  uint64_t launches, blocks, accesses, matrix_loads, matrix_load_conflicts, products;
};
const Counts& counts();

// ---- for kernels ----

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
char* shared_memory();
uint32_t shared_offset(const void* p);          // of an address in shared memory
char* shared_pointer(uint32_t offset);

void synchronize(int barrier, int threads);     // bar.sync
void synchronize_warp(uint32_t mask);

// Waits for all lanes of `mask` to come here with the same `operation`; the last one runs it for all. mine[lane] is what
// each has brought, on its own stack.
using Operation = void (*)(void* const* mine, uint32_t mask);
void together(const char* what, uint32_t mask, void* mine, Operation operation);
unsigned lane();

// An access on behalf of a lane of the running warp; `where`: an address in the kernel's code, for messages.
void access(unsigned lane, const void* p, size_t bytes, Access kind, const void* where);

// cp.async: `bytes` of `total` are copied, the rest is zero. They arrive when their group is waited for.
void copy_async(void* shared, const void* global, size_t bytes, size_t total, const void* where);
void commit_copies();
void wait_for_copies(unsigned groups_still_open);

Counts& count();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation
