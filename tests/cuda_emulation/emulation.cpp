// Threads as fibers, barriers, warps. See emulation.h.
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>

#include "machine.h"

namespace emulation {

bool running = false;
uint32_t block_serial = 0, first_block = 0;
size_t shared_bytes = 0;
char* stacks = nullptr;

namespace {

struct Thread {
  ucontext_t start;
  jmp_buf here;
  bool started, ready, done;
  const char* waits_for;
  uint3 index;
  uint32_t clock;
  Seen seen;
  std::vector<Copy> copies;
  unsigned open_group;
};

struct Meeting {  // of the lanes of a warp
  const char* what;
  Operation operation;
  uint32_t mask, arrived;
  void* mine[kLanes];
};

struct Barrier {
  int threads;
  std::vector<unsigned> arrived;
};

struct Machine {
  dim3 grid, block;
  uint3 block_index;
  unsigned threads, warps, current, alive;
  void (*body)(const void*);
  const void* context;
  std::vector<Thread> thread;
  std::vector<Meeting> meeting;
  std::vector<uint32_t> ready;      // a bit a lane, by warp
  std::vector<unsigned> warp_order, place_in_order;
  bool descending;
  Barrier barrier[16];
  jmp_buf host;
  uint64_t seed;
  std::string error;
  Counts counts;
} machine;

uint64_t shuffle(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

void order_threads() {
  uint64_t state = machine.seed + block_serial;
  machine.descending = machine.seed && shuffle(state) % 2;
  machine.warp_order.resize(machine.warps);
  std::iota(machine.warp_order.begin(), machine.warp_order.end(), 0u);
  if (machine.seed)
    for (unsigned i = machine.warps; i > 1; --i) std::swap(machine.warp_order[i - 1], machine.warp_order[shuffle(state) % i]);
  machine.place_in_order.resize(machine.warps);
  for (unsigned i = 0; i < machine.warps; ++i) machine.place_in_order[machine.warp_order[i]] = i;
}

void make_ready(unsigned thread) {
  machine.thread[thread].waits_for = nullptr;
  machine.ready[thread / kLanes] |= 1u << thread % kLanes;
}

[[noreturn]] void go_to(unsigned thread) {
  machine.current = thread;
  Thread& t = machine.thread[thread];
  machine.ready[thread / kLanes] &= ~(1u << thread % kLanes);
  if (t.started) _longjmp(t.here, 1);
  t.started = true;
  setcontext(&t.start);
  __builtin_unreachable();
}

std::string waiting_threads() {
  std::string text;
  int shown = 0, ended = 0;
  for (unsigned i = 0; i < machine.threads; ++i) {
    ended += machine.thread[i].done;
    if (!machine.thread[i].waits_for || shown == 4) continue;
    text += (shown++ ? ", thread " : "thread ") + std::to_string(i) + " waits at " + machine.thread[i].waits_for;
  }
  return text + "; " + std::to_string(ended) + " of " + std::to_string(machine.threads) + " threads have ended";
}

// The next thread: one of the same warp if any can run.
[[noreturn]] void go_on() {
  const unsigned warp = machine.current / kLanes, lane = machine.current % kLanes;
  for (unsigned i = 0; i < machine.warps; ++i) {
    const unsigned w = machine.warp_order[(machine.place_in_order[warp] + i) % machine.warps];
    const uint32_t bits = machine.ready[w];
    if (!bits) continue;
    unsigned next;
    if (machine.descending) {
      const uint32_t below = i ? bits : bits & ((1u << lane) - 1);
      next = 31 - __builtin_clz(below ? below : bits);
    } else {
      const uint32_t above = i ? bits : bits & ~((2u << lane) - 1);
      next = __builtin_ctz(above ? above : bits);
    }
    go_to(w * kLanes + next);
  }
  if (!machine.alive) _longjmp(machine.host, 1);
  fail("deadlock: %s", waiting_threads().c_str());
}

void suspend(const char* waits_for) {
  Thread& t = machine.thread[machine.current];
  t.waits_for = waits_for;
  if (_setjmp(t.here) == 0) go_on();
}

void thread_main() {
  machine.body(machine.context);
  Thread& t = machine.thread[machine.current];
  if (!t.copies.empty()) fail("a thread ends before its cp.async copies were waited for");
  t.done = true;
  --machine.alive;
  go_on();
}

// These threads have seen all that each of them did.
void meet(const unsigned* threads, size_t count) {
  auto seen = std::make_shared<std::vector<uint32_t>>(machine.threads, 0u);
  const std::vector<uint32_t>* last = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const auto* theirs = machine.thread[threads[i]].seen.get();
    if (theirs == last) continue;
    for (unsigned u = 0; u < machine.threads; ++u) (*seen)[u] = std::max((*seen)[u], (*theirs)[u]);
    last = theirs;
  }
  for (size_t i = 0; i < count; ++i) {
    uint32_t& own = (*seen)[threads[i]];
    own = std::max(own, machine.thread[threads[i]].clock);
  }
  for (size_t i = 0; i < count; ++i) {
    machine.thread[threads[i]].seen = seen;
    ++machine.thread[threads[i]].clock;
  }
}

void run_block(uint3 index) {
  machine.block_index = index;
  ++block_serial;
  ++machine.counts.blocks;
  order_threads();
  start_block_memory();
  const auto nothing = std::make_shared<const std::vector<uint32_t>>(machine.threads, 0u);
  machine.alive = machine.threads;
  machine.meeting.assign(machine.warps, Meeting{});
  machine.ready.assign(machine.warps, 0);
  for (Barrier& barrier : machine.barrier) barrier.arrived.clear();
  for (unsigned i = 0; i < machine.threads; ++i) {
    Thread& t = machine.thread[i];
    t.started = t.done = false;
    t.index = {i % machine.block.x, i / machine.block.x % machine.block.y, i / (machine.block.x * machine.block.y)};
    t.clock = 1;
    t.seen = nothing;
    t.copies.clear();
    t.open_group = 0;
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = stacks + i * kStackBytes;
    t.start.uc_stack.ss_size = kStackBytes;
    t.start.uc_link = nullptr;
    makecontext(&t.start, thread_main, 0);
    make_ready(i);
  }
  machine.current = machine.warp_order[0] * kLanes + kLanes - 1;
  if (_setjmp(machine.host) == 0) go_on();
}

}  // namespace

int launch(dim3 grid, dim3 block, size_t bytes, void (*body)(const void*), const void* context) {
  machine.error.clear();
  ++machine.counts.launches;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || !threads ||
      threads > kMostThreads || block.z > 64 || bytes > kMostSharedBytes) {
    machine.error = "invalid launch configuration";
    return 9;  // cudaErrorInvalidConfiguration
  }
  if (threads % kLanes) {
    machine.error = "blocks of incomplete warps are not emulated";
    return 9;
  }
  if (!stacks)
    stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  machine.grid = grid;
  machine.block = block;
  machine.threads = static_cast<unsigned>(threads);
  machine.warps = machine.threads / kLanes;
  machine.thread.resize(kMostThreads);
  machine.body = body;
  machine.context = context;
  shared_bytes = bytes;
  first_block = block_serial + 1;
  start_launch_memory();
  running = true;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && machine.error.empty(); ++i) {
    const uint64_t b = machine.seed % 2 ? blocks - 1 - i : i;
    run_block({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
               static_cast<unsigned>(b / grid.x / grid.y)});
  }
  running = false;
  end_launch_memory();
  return machine.error.empty() ? 0 : 700;  // cudaErrorIllegalAddress
}

const char* last_error() { return machine.error.c_str(); }
void set_order(uint64_t seed) { machine.seed = seed; }
const Counts& counts() { return machine.counts; }
Counts& count() { return machine.counts; }

uint3 thread_index() { return machine.thread[machine.current].index; }
uint3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }
unsigned lane() { return machine.current % kLanes; }
unsigned running_thread() { return machine.current; }
const char* own_stack() { return stacks + machine.current * kStackBytes; }

Identity identity_of(unsigned thread) {
  const Thread& t = machine.thread[thread];
  return {thread, t.clock, t.seen->data()};
}

void fail(const char* format, ...) {
  char text[800];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const uint3 b = machine.block_index, t = machine.thread[machine.current].index;
  char place[160];
  snprintf(place, sizeof place, " (thread (%u, %u, %u) of block (%u, %u, %u))", t.x, t.y, t.z, b.x, b.y, b.z);
  machine.error = std::string(text) + place;
  _longjmp(machine.host, 1);
}

void synchronize(int barrier, int threads) {
  if (barrier < 0 || barrier > 15) fail("barrier %d does not exist", barrier);
  if (threads <= 0 || threads % static_cast<int>(kLanes)) fail("barrier %d waits for %d threads, no number of warps", barrier, threads);
  Barrier& b = machine.barrier[barrier];
  if (b.arrived.empty()) b.threads = threads;
  if (b.threads != threads) fail("barrier %d: one thread waits for %d threads, another for %d", barrier, b.threads, threads);
  b.arrived.push_back(machine.current);
  if (static_cast<int>(b.arrived.size()) < threads) {
    static char names[16][24];
    snprintf(names[barrier], sizeof names[barrier], "barrier %d", barrier);
    return suspend(names[barrier]);
  }
  meet(b.arrived.data(), b.arrived.size());
  for (unsigned thread : b.arrived)
    if (thread != machine.current) make_ready(thread);
  b.arrived.clear();
}

void together(const char* what, uint32_t mask, void* mine, Operation operation) {
  const unsigned warp = machine.current / kLanes, me = lane();
  Meeting& m = machine.meeting[warp];
  if (!(mask >> me & 1)) fail("%s: lane %u is not in its own mask %08x", what, me, mask);
  if (!m.arrived) m = {what, operation, mask, 0, {}};
  if (m.operation != operation || m.mask != mask)
    fail("the lanes of a warp are at different instructions: %s (mask %08x) and %s (mask %08x)", m.what, m.mask, what, mask);
  m.mine[me] = mine;
  m.arrived |= 1u << me;
  if (m.arrived != mask) return suspend(what);
  operation(m.mine, mask);
  m.arrived = 0;
  for (unsigned i = 0; i < kLanes; ++i)
    if (mask >> i & 1 && i != me) make_ready(warp * kLanes + i);
}

void synchronize_warp(uint32_t mask) {
  together("__syncwarp", mask, nullptr, [](void* const*, uint32_t lanes) {
    unsigned threads[kLanes];
    size_t count = 0;
    for (unsigned i = 0; i < kLanes; ++i)
      if (lanes >> i & 1) threads[count++] = machine.current / kLanes * kLanes + i;
    meet(threads, count);
  });
}

void access(unsigned which, const void* p, size_t bytes, Access kind, const void* where) {
  checked(machine.current / kLanes * kLanes + which, p, bytes, kind, where);
}

void copy_async(void* shared, const void* global, size_t bytes, size_t total, const void* where) {
  Thread& t = machine.thread[machine.current];
  if (reinterpret_cast<uintptr_t>(shared) % total || (bytes && reinterpret_cast<uintptr_t>(global) % total))
    fail("cp.async of %zu bytes is misaligned", total);
  checked(machine.current, shared, total, Access::write, where);
  if (bytes) checked(machine.current, global, bytes, Access::read, where);
  mark_pending(shared, total, true);
  memset(shared, 0xff, total);
  t.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, total, t.open_group});
}

void commit_copies() { ++machine.thread[machine.current].open_group; }

void wait_for_copies(unsigned groups_still_open) {
  Thread& t = machine.thread[machine.current];
  size_t kept = 0;
  for (const Copy& copy : t.copies) {
    if (copy.group + groups_still_open >= t.open_group) {
      t.copies[kept++] = copy;
      continue;
    }
    mark_pending(copy.to, copy.total, false);
    checked(machine.current, copy.to, copy.total, Access::write, nullptr);
    memcpy(copy.to, copy.from, copy.bytes);
    memset(copy.to + copy.bytes, 0, copy.total - copy.bytes);
  }
  t.copies.resize(kept);
}

}  // namespace emulation

extern "C" void emulation_set_order(uint64_t seed) { emulation::set_order(seed); }
extern "C" emulation::Counts emulation_counts() { return emulation::counts(); }
