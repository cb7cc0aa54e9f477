// What kernels may touch, and who touched it last. See emulation.h.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "machine.h"

namespace emulation {

namespace {

constexpr size_t kGrain = 2;  // bytes that share a history: what is written byte by byte is not watched more closely
constexpr size_t kSharedArena = 256 * 1024;  // more than a block gets, so that what lies past its end is told apart

struct Event {
  uint32_t block, clock;
  uint32_t thread;
};

// The last write, and the last reads of two different warps.
struct History {
  Event write, read, other_read;
  bool pending;  // a cp.async is still to write here
};

struct Region {
  uintptr_t begin, end;
  std::string name;
  History* histories;

  size_t history_bytes() const { return ((end - begin) / kGrain + 2) * sizeof(History); }
};

std::vector<Region> regions;  // by address, apart from each other
char* shared_arena = nullptr;
History* shared_histories = nullptr;
uintptr_t code_begin = 0, code_end = 0, host_stack_begin = 0, host_stack_end = 0;

History* fresh_histories(size_t bytes) {  // zeros; pages that nobody touches cost nothing
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<History*>(p);
}

std::string source_line(const void* where) {
  Dl_info info;
  if (!where || !dladdr(where, &info) || !info.dli_fname) return "";
  char command[600];
  snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           static_cast<size_t>(static_cast<const char*>(where) - static_cast<const char*>(info.dli_fbase)) - 1);
  std::string line;
  if (FILE* pipe = popen(command, "r")) {
    char text[200];
    if (fgets(text, sizeof text, pipe)) line = text;
    pclose(pipe);
  }
  line.erase(std::min(line.find_first_of("\n ("), line.size()));
  return line.empty() || line[0] == '?' ? "" : " [" + line + "]";
}

const char* verb(Access kind) { return kind == Access::read ? "reads" : "writes"; }

struct Attempt {
  const Identity& me;
  Access kind;
  size_t bytes;
  const char* memory;  // name of it
  size_t offset;
  const void* where;

  [[noreturn]] void refuse(const char* why) const {
    fail("thread %u %s %zu bytes of %s at offset %zu: %s%s", me.thread, verb(kind), bytes, memory, offset, why,
         source_line(where).c_str());
  }
  [[noreturn]] void race(const Event& other, const char* what) const {
    char why[160];
    if (other.block != block_serial)
      snprintf(why, sizeof why, "another block of this launch %s it", what);
    else
      snprintf(why, sizeof why, "thread %u %s it, and no barrier lies between", other.thread, what);
    refuse(why);
  }
};

// `oldest`: events of earlier blocks are forgotten.
void track(History& h, const Attempt& attempt, uint32_t oldest) {
  const Identity& me = attempt.me;
  auto unordered = [&](const Event& e) {
    return e.block >= oldest && (e.block != block_serial || (e.thread != me.thread && me.seen[e.thread] < e.clock));
  };
  if (h.pending) attempt.refuse("a cp.async that was not waited for writes there");
  if (unordered(h.write)) attempt.race(h.write, "has written");
  const Event now = {block_serial, me.clock, me.thread};
  if (attempt.kind == Access::read) {
    if (h.read.block != now.block || h.read.thread / kLanes != now.thread / kLanes) h.other_read = h.read;
    h.read = now;
  } else {
    if (unordered(h.read)) attempt.race(h.read, "has read");
    if (unordered(h.other_read)) attempt.race(h.other_read, "has read");
    h.write = now;
  }
}

void check_alignment(const Attempt& attempt, uintptr_t p) {
  if ((attempt.bytes & (attempt.bytes - 1)) == 0 && attempt.bytes <= 16 && p % attempt.bytes) attempt.refuse("misaligned");
}

Region* region_of(uintptr_t p) {
  auto after = std::upper_bound(regions.begin(), regions.end(), p, [](uintptr_t at, const Region& r) { return at < r.begin; });
  return after == regions.begin() ? nullptr : &*(after - 1);
}

}  // namespace

void allow(const void* begin, size_t bytes, const char* name) {
  if (!bytes) return;
  Region added{reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes, name, nullptr};
  std::vector<Region> kept;
  for (Region& r : regions) {
    if (r.end <= added.begin || added.end <= r.begin) {
      kept.push_back(r);
      continue;
    }
    added.begin = std::min(added.begin, r.begin);
    added.end = std::max(added.end, r.end);
    if (added.name != r.name) added.name = r.name + "+" + added.name;
  }
  kept.push_back(added);
  std::sort(kept.begin(), kept.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  regions = std::move(kept);
}

void forget_all() { regions.clear(); }

void start_launch_memory() {
  if (!shared_arena) {
    shared_arena = static_cast<char*>(mmap(nullptr, kSharedArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    shared_histories = fresh_histories(kSharedArena / kGrain * sizeof(History));
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          uintptr_t low = ~uintptr_t(0), high = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            low = std::min(low, static_cast<uintptr_t>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr));
            high = std::max(high, static_cast<uintptr_t>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz));
          }
          const uintptr_t here = reinterpret_cast<uintptr_t>(&start_launch_memory);
          if (here < low || here >= high) return 0;
          code_begin = low;
          code_end = high;
          return 1;
        },
        nullptr);
  }
  pthread_attr_t attributes;  // parameters of a launch lie on the launching thread's stack
  void* stack;
  size_t size;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &size);
  pthread_attr_destroy(&attributes);
  host_stack_begin = reinterpret_cast<uintptr_t>(stack);
  host_stack_end = host_stack_begin + size;
  for (Region& r : regions) {
    r.histories = fresh_histories(r.history_bytes());
    if (!r.histories) fprintf(stderr, "emulation: no memory for the histories of %s\n", r.name.c_str());
  }
}

void end_launch_memory() {
  for (Region& r : regions) {
    if (r.histories) munmap(r.histories, r.history_bytes());
    r.histories = nullptr;
  }
}

void start_block_memory() {
  memset(shared_arena, 0xff, shared_bytes);
  for (size_t i = 0; i < shared_bytes / kGrain; ++i) shared_histories[i].pending = false;
}

char* shared_memory() { return shared_arena; }
uint32_t shared_offset(const void* p) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(shared_arena);
  if (offset > kSharedArena) fail("an address outside of shared memory is used as one in it");
  return static_cast<uint32_t>(offset);
}
char* shared_pointer(uint32_t offset) { return shared_arena + offset; }

void mark_pending(const void* p, size_t bytes, bool pending) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - shared_arena);
  for (size_t i = offset / kGrain; i < (offset + bytes) / kGrain; ++i) shared_histories[i].pending = pending;
}

void checked(unsigned thread, const void* pointer, size_t bytes, Access kind, const void* where) {
  const uintptr_t p = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t all_stacks = reinterpret_cast<uintptr_t>(stacks);
  if (p - all_stacks < kMostThreads * kStackBytes) {
    const uintptr_t own = p - reinterpret_cast<uintptr_t>(own_stack());
    if (own >= kStackBytes) fail("thread %u %s another thread's local memory%s", thread, verb(kind), source_line(where).c_str());
    return;
  }
  if (p >= host_stack_begin && p < host_stack_end) {
    if (kind == Access::write) fail("thread %u writes a parameter of the launch%s", thread, source_line(where).c_str());
    return;
  }
  ++count().accesses;
  const Identity me = identity_of(thread);
  const uintptr_t offset = p - reinterpret_cast<uintptr_t>(shared_arena);
  if (offset < kSharedArena) {
    const Attempt attempt{me, kind, bytes, "shared memory", offset, where};
    check_alignment(attempt, p);
    if (offset + bytes > shared_bytes) attempt.refuse("past its end");
    for (size_t i = offset / kGrain; i <= (offset + bytes - 1) / kGrain; ++i) {
      History& h = shared_histories[i];
      if (kind == Access::read && h.write.block != block_serial && !h.pending) attempt.refuse("nothing in this block has written it");
      track(h, attempt, block_serial);
    }
    return;
  }
  if (Region* r = region_of(p); r && p < r->end) {
    const Attempt attempt{me, kind, bytes, r->name.c_str(), p - r->begin, where};
    check_alignment(attempt, p);
    if (p + bytes > r->end) attempt.refuse("past its end");
    for (size_t i = (p - r->begin) / kGrain; i <= (p + bytes - 1 - r->begin) / kGrain; ++i) track(r->histories[i], attempt, first_block);
    return;
  }
  if (p >= code_begin && p < code_end) {
    if (kind == Access::write) fail("thread %u writes a constant%s", thread, source_line(where).c_str());
    return;
  }
  char near[160] = "";
  size_t least = 1 << 16;
  for (const Region& r : regions) {
    const size_t distance = p < r.begin ? r.begin - p : p - r.end;
    if (distance >= least) continue;
    least = distance;
    snprintf(near, sizeof near, ", %zu bytes %s %s", distance, p < r.begin ? "before" : "past the end of", r.name.c_str());
  }
  fail("thread %u %s %zu bytes outside of the memory it was given%s%s", thread, verb(kind), bytes, near, source_line(where).c_str());
}

namespace {
inline void instrumented(const void* p, size_t bytes, Access kind, const void* where) {
  if (running) checked(running_thread(), p, bytes, kind, where);
}
}  // namespace

}  // namespace emulation

// What g++ -fsanitize=thread calls before every access.
extern "C" {
#define XF_HERE __builtin_return_address(0)
#define XF_HOOK(bytes)                                                                                             \
  void __tsan_read##bytes(void* p) { emulation::instrumented(p, bytes, emulation::Access::read, XF_HERE); }        \
  void __tsan_write##bytes(void* p) { emulation::instrumented(p, bytes, emulation::Access::write, XF_HERE); }      \
  void __tsan_unaligned_read##bytes(void* p) { emulation::instrumented(p, bytes, emulation::Access::read, XF_HERE); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::instrumented(p, bytes, emulation::Access::write, XF_HERE); }
XF_HOOK(1)
XF_HOOK(2)
XF_HOOK(4)
XF_HOOK(8)
XF_HOOK(16)
void __tsan_read_range(void* p, size_t bytes) { emulation::instrumented(p, bytes, emulation::Access::read, XF_HERE); }
void __tsan_write_range(void* p, size_t bytes) { emulation::instrumented(p, bytes, emulation::Access::write, XF_HERE); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_init() {}
}

// And g++ -fsanitize=alignment,bounds,shift,signed-integer-overflow, where what it checks is not so. The checks of alignment
// count: the optimiser may split a wide access into narrow ones before the calls above are placed.
namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};

void refuse(const Place* place, const char* what) {
  if (!emulation::running) {
    fprintf(stderr, "%s:%u: %s\n", place->file, place->line, what);
    return;
  }
  const char* slash = strrchr(place->file, '/');
  emulation::fail("%s [%s:%u]", what, slash ? slash + 1 : place->file, place->line);
}
}  // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1(const Place* place, uintptr_t pointer) {
  char what[100];
  snprintf(what, sizeof what, "an access through a misaligned pointer, %zu bytes past a multiple of 16", static_cast<size_t>(pointer % 16));
  refuse(place, what);
}
void __ubsan_handle_out_of_bounds(const Place* place, uintptr_t) { refuse(place, "an index outside of its array"); }
void __ubsan_handle_shift_out_of_bounds(const Place* place, uintptr_t, uintptr_t) { refuse(place, "a shift past the width"); }
void __ubsan_handle_add_overflow(const Place* place, uintptr_t, uintptr_t) { refuse(place, "a sum overflows"); }
void __ubsan_handle_sub_overflow(const Place* place, uintptr_t, uintptr_t) { refuse(place, "a difference overflows"); }
void __ubsan_handle_mul_overflow(const Place* place, uintptr_t, uintptr_t) { refuse(place, "a product overflows"); }
void __ubsan_handle_divrem_overflow(const Place* place, uintptr_t, uintptr_t) { refuse(place, "a division overflows"); }
void __ubsan_handle_negate_overflow(const Place* place, uintptr_t) { refuse(place, "a negation overflows"); }
}
