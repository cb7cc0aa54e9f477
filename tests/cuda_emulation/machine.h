// What the scheduler (emulation.cpp) and the memory (memory.cpp) know of each other.
#pragma once
#include <memory>
#include <vector>

#include "emulation.h"

namespace emulation {

// What a thread has seen of the others: of thread u everything up to (*seen)[u]. Shared by those that met at a barrier.
using Seen = std::shared_ptr<const std::vector<uint32_t>>;

struct Copy {
  char* to;
  const char* from;
  size_t bytes, total;
  unsigned group;
};

struct Identity {
  unsigned thread;   // in the block
  uint32_t clock;    // barriers it has passed
  const uint32_t* seen;
};

extern bool running;          // a kernel is
extern char* stacks;          // of all threads
extern uint32_t block_serial; // of the running block, counted over all launches
extern uint32_t first_block;  // of the running launch
extern size_t shared_bytes;

Identity identity_of(unsigned thread);
unsigned running_thread();
const char* own_stack();      // of the running thread
constexpr unsigned kMostThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;

void start_launch_memory();
void end_launch_memory();
void start_block_memory();
void checked(unsigned thread, const void* p, size_t bytes, Access kind, const void* where);
void mark_pending(const void* p, size_t bytes, bool pending);

}  // namespace emulation
