// The scheduler and the race detector of emulation.h. Never compiled with -fsanitize=thread.
#include "emulation.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define GUMBEL_EXT_ASAN 1
#endif

#if defined(__x86_64__)
// Saves the registers that a call must keep, and goes on where another fiber left off.
extern "C" void gumbel_ext_switch_fiber(void** save_stack, void* load_stack);
asm(R"(
.text
.p2align 4
.globl gumbel_ext_switch_fiber
.hidden gumbel_ext_switch_fiber
.type gumbel_ext_switch_fiber,@function
gumbel_ext_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gumbel_ext_switch_fiber,.-gumbel_ext_switch_fiber
)");
#else
#include <ucontext.h>
#endif

namespace gumbel_ext {
namespace emulation {

Coordinates coordinates;
const int planted =
    std::getenv("GUMBEL_EXT_PLANTED") ? std::atoi(std::getenv("GUMBEL_EXT_PLANTED")) : -1;

Options& options() {
  static Options options;
  return options;
}

namespace {

constexpr std::size_t kStackBytes = 256 << 10;

enum class State { kReady, kAtBlockBarrier, kAtClusterBarrier, kInWarpOperation, kDone };

struct Fiber {
  char* stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* asan_stack = nullptr;
  int id = 0;  // in the cluster
  State state = State::kReady;
  Site site{};
  WarpOp op{};
  unsigned mask = 0, value = 0, result = 0;
  int source_lane = 0;
  std::uint32_t priority = 0;
};

struct SharedArray {
  const void* declaration;
  char* data;
  std::size_t bytes;
};

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[600];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string text_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return text("%s:%d", slash ? slash + 1 : site.file, site.line);
}

class Scheduler;
Scheduler* running = nullptr;
void fiber_main();

// ---- races -------------------------------------------------------------------------------------

// An access to one byte. A block's barrier begins a new epoch of that block, a cluster's one of the
// cluster and of all its blocks; what lies in different epochs is ordered. Shuffles order nothing.
struct Access {
  std::uint32_t group = 0, block = 0, block_epoch = 0, cluster_epoch = 0;
  int thread = -1;  // in the cluster; -1: none yet
};
struct ByteHistory {
  Access write, read, other_read;
};

class RaceDetector {
 public:
  void start_launch() { bytes_.clear(); }
  void access(const void* address, std::size_t size, bool write, const Access& now);
  // Of memory that the next block may be given again.
  void forget(const void* address, std::size_t size) {
    if (bytes_.empty()) return;
    for (std::size_t i = 0; i < size; ++i) {
      bytes_.erase(reinterpret_cast<std::uintptr_t>(address) + i);
    }
  }

  bool found = false;
  std::string what;

 private:
  std::unordered_map<std::uintptr_t, ByteHistory> bytes_;
};

// ---- scheduling --------------------------------------------------------------------------------

class Scheduler {
 public:
  ~Scheduler() {
    for (Fiber& f : fibers_) munmap(f.stack, kStackBytes);
  }

  void launch(dim3 grid, int threads, int cluster, const std::function<void()>& kernel) {
    if (running != nullptr) throw Error("a kernel launched a kernel");
    if (threads < 1 || threads > 1024) throw Error(text("%d threads in a block", threads));
    if (grid.x % static_cast<unsigned>(cluster) != 0) {
      throw Error("the grid is not a multiple of the cluster");
    }
    if (grid.y > 65535 || grid.z > 65535) throw Error("grid.y or grid.z exceeds 65535");
    kernel_ = &kernel;
    threads_ = threads;
    cluster_ = cluster;
    random_.seed(static_cast<std::uint32_t>(options().seed));
    races_.start_launch();
    coordinates.block_size = dim3(static_cast<unsigned>(threads));
    coordinates.grid_size = grid;
    running = this;
    group_ = 0;
    for (unsigned y = 0; y < grid.y && error_.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && error_.empty(); x += static_cast<unsigned>(cluster)) {
        run_cluster(x, y);
        ++group_;
      }
    }
    running = nullptr;
    if (races_.found && error_.empty()) error_ = races_.what;
    races_.found = false;
    if (error_.empty()) return;
    const std::string error = error_;
    error_.clear();
    throw Error(error);
  }

  void block_barrier(Site site) {
    current_->site = site;
    wait(State::kAtBlockBarrier);
  }
  void cluster_barrier(Site site) {
    current_->site = site;
    wait(State::kAtClusterBarrier);
  }

  unsigned warp_operation(WarpOp op, unsigned mask, unsigned value, int source_lane, Site site) {
    Fiber& f = *current_;
    f.op = op;
    f.mask = mask;
    f.value = value;
    f.source_lane = source_lane;
    f.site = site;
    if (!(mask >> (f.id % threads_ % 32) & 1)) {
      fail("its lane is not in the mask of its own warp operation at " + text_of(site));
    }
    wait(State::kInWarpOperation);
    return f.result;
  }

  void* shared_array(const void* declaration, std::size_t bytes) {
    std::vector<SharedArray>& arrays = shared_[block_rank()];
    for (const SharedArray& a : arrays) {
      if (a.declaration == declaration) return a.data;
    }
    char* data = static_cast<char*>(::operator new(bytes, std::align_val_t(16)));
    std::memset(data, 0xFF, bytes);
    arrays.push_back({declaration, data, bytes});
    return data;
  }

  const void* shared_array_of(const void* own, unsigned rank) {
    const char* address = static_cast<const char*>(own);
    for (const SharedArray& a : shared_[block_rank()]) {
      if (address < a.data || address >= a.data + a.bytes) continue;
      if (rank >= shared_.size()) fail("it reads the shared memory of a block outside its cluster");
      if (block_done(rank)) fail("it reads the shared memory of a block that has ended");
      for (const SharedArray& theirs : shared_[rank]) {
        if (theirs.declaration == a.declaration) return theirs.data + (address - a.data);
      }
      fail("it reads another block's shared memory before that block has reached it");
    }
    fail("it reads another block's copy of memory that is not shared");
  }

  unsigned cluster_blocks() const { return static_cast<unsigned>(cluster_); }
  unsigned block_rank() const { return static_cast<unsigned>(current_->id / threads_); }
  int lane() const { return current_->id % threads_ % 32; }

  void run_fiber() {
    (*kernel_)();
    current_->state = State::kDone;
    leave(true);
    std::abort();
  }

  void forbid(const void* address, std::size_t bytes) {
    forbidden_.emplace_back(static_cast<const char*>(address), bytes);
  }
  void allow(const void* address) {
    forbidden_.erase(std::find_if(forbidden_.begin(), forbidden_.end(),
                                  [=](const auto& range) { return range.first == address; }));
  }

  void expect_aligned(const void* address, std::size_t size) {
    if (reinterpret_cast<std::uintptr_t>(address) % size != 0) {
      fail(text("it accesses %zu bytes at %p, which is not aligned", size, address));
    }
  }

  void memory_access(const void* address, std::size_t size, bool write) {
    const char* a = static_cast<const char*>(address);
    if (current_ == nullptr || (a >= current_->stack && a < current_->stack + kStackBytes)) return;
    for (const auto& [begin, bytes] : forbidden_) {
      if (a + size > begin && a < begin + bytes && error_.empty()) {
        error_ = where(*current_) + (write ? "it writes" : "it reads") + " outside of an array";
      }
    }
    const unsigned block = block_rank();
    races_.access(address, size, write,
                  {group_, block, epochs_[block], cluster_epoch_, current_->id});
  }

 private:
  void run_cluster(unsigned x, unsigned y) {
    const int count = threads_ * cluster_;
    while (static_cast<int>(fibers_.size()) < count) {
      Fiber f;
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw Error("out of memory for fibers");
      f.stack = static_cast<char*>(memory);
      fibers_.push_back(f);
    }
    block_x_ = x;
    block_y_ = y;
    shared_.assign(static_cast<std::size_t>(cluster_), {});
    epochs_.assign(static_cast<std::size_t>(cluster_), 0);
    arrived_.assign(static_cast<std::size_t>(cluster_) + 1, 0);
    cluster_epoch_ = 0;
    ready_.clear();
    done_ = 0;
    for (int i = 0; i < count; ++i) {
      Fiber& f = fibers_[static_cast<std::size_t>(i)];
      f.id = i;
      f.priority = static_cast<std::uint32_t>(random_());
      prepare(f);
      make_ready(f);
    }
    while (done_ < count && error_.empty()) {
      if (ready_.empty() && !release()) {
        error_ = deadlock(count);
        break;
      }
      enter(take());
      if (current_->state == State::kDone) {
        ++done_;
      } else if (options().order == Order::kGreedy && completes(*current_)) {
        const Fiber& f = *current_;
        if (f.state == State::kInWarpOperation) {
          release_warp(f.id - f.id % threads_ % 32);
        } else {
          release();
        }
      }
    }
    current_ = nullptr;
    for (const std::vector<SharedArray>& arrays : shared_) {
      for (const SharedArray& a : arrays) {
        races_.forget(a.data, a.bytes);
        ::operator delete(a.data, std::align_val_t(16));
      }
    }
  }

  void make_ready(Fiber& f) {
    f.state = State::kReady;
    ready_.push_back(&f);
    if (options().order == Order::kGreedy)
      std::push_heap(ready_.begin(), ready_.end(), less_urgent);
  }

  static bool less_urgent(const Fiber* a, const Fiber* b) { return a->priority < b->priority; }

  Fiber& take() {
    switch (options().order) {
      case Order::kGreedy:
        std::pop_heap(ready_.begin(), ready_.end(), less_urgent);
        break;
      case Order::kRandom:
        std::swap(ready_[random_() % ready_.size()], ready_.back());
        break;
      case Order::kInOrder:
        // Lowest first: they were pushed in order, so a whole round is reversed once.
        if (!in_round_) {
          std::reverse(ready_.begin(), ready_.end());
          in_round_ = true;
        }
        break;
      case Order::kReverse:
        break;
    }
    Fiber& f = *ready_.back();
    ready_.pop_back();
    if (ready_.empty()) in_round_ = false;
    return f;
  }

  // Whether a thread that has begun to wait was the last that others waited for.
  bool completes(const Fiber& f) {
    if (f.state == State::kInWarpOperation) {
      const int first = f.id - f.id % threads_ % 32;
      for (int k = 0; k < 32; ++k) {
        if ((f.mask >> k & 1) && k < threads_ - first % threads_ &&
            at(first + k).state != State::kInWarpOperation) {
          return false;
        }
      }
      return true;
    }
    const bool of_block = f.state == State::kAtBlockBarrier;
    const int first = of_block ? f.id - f.id % threads_ : 0;
    const int count = of_block ? threads_ : threads_ * cluster_;
    int& arrived = arrived_[static_cast<std::size_t>(of_block ? f.id / threads_ : cluster_)];
    if (++arrived < count) return false;
    arrived = 0;
    for (int i = first; i < first + count; ++i) {
      if (at(i).state != f.state) return false;
    }
    return true;
  }

  // Lets go on whoever need not wait any longer; returns whether anybody.
  bool release() {
    bool any = false;
    const int count = threads_ * cluster_;
    bool cluster_ready = true;
    for (int b = 0; b < cluster_; ++b) {
      const int first = b * threads_;
      bool block_ready = true;
      for (int i = first; i < first + threads_; ++i) {
        block_ready = block_ready && at(i).state == State::kAtBlockBarrier;
        cluster_ready = cluster_ready && at(i).state == State::kAtClusterBarrier;
      }
      if (block_ready) {
        check_same_site(first, first + threads_);
        ++epochs_[static_cast<std::size_t>(b)];
        for (int i = first; i < first + threads_; ++i) make_ready(at(i));
        any = true;
        continue;
      }
      for (int w = first; w < first + threads_; w += 32) any = release_warp(w) || any;
    }
    if (cluster_ready) {
      check_same_site(0, count);
      ++cluster_epoch_;
      for (std::uint32_t& epoch : epochs_) ++epoch;
      for (int i = 0; i < count; ++i) make_ready(at(i));
      any = true;
    }
    return any;
  }

  bool release_warp(int first) {
    const int lanes = std::min(32, threads_ - first % threads_);
    bool any = false;
    for (int l = 0; l < lanes; ++l) {
      Fiber& f = at(first + l);
      if (f.state != State::kInWarpOperation) continue;
      // All lanes of its mask must be here, with the same mask, in the same operation.
      bool complete = true;
      unsigned any_value = 0;
      int least = std::numeric_limits<int>::max(), most = std::numeric_limits<int>::min();
      for (int k = 0; k < 32; ++k) {
        if (!(f.mask >> k & 1)) continue;
        if (k >= lanes) {
          error_ = where(f) + "its warp operation at " + text_of(f.site) + " names lane " +
                   std::to_string(k) + ", which does not exist";
          return false;
        }
        const Fiber& other = at(first + k);
        if (other.state == State::kDone) {
          error_ = where(f) + "its warp operation at " + text_of(f.site) + " names lane " +
                   std::to_string(k) + ", which has ended";
          return false;
        }
        if (other.state != State::kInWarpOperation) {
          complete = false;
          continue;
        }
        if (other.mask != f.mask || other.op != f.op || other.site.line != f.site.line ||
            std::strcmp(other.site.file, f.site.file) != 0) {
          error_ = where(f) + "divergent warp operations: " + text_of(f.site) + " and, lane " +
                   std::to_string(k) + ", " + text_of(other.site);
          return false;
        }
        any_value |= other.value;
        least = std::min(least, static_cast<int>(other.value));
        most = std::max(most, static_cast<int>(other.value));
      }
      if (!complete) continue;
      for (int k = 0; k < lanes; ++k) {
        if (!(f.mask >> k & 1)) continue;
        Fiber& g = at(first + k);
        if (g.op == WarpOp::kAny) {
          g.result = any_value;
        } else if (g.op == WarpOp::kMin || g.op == WarpOp::kMax) {
          g.result = static_cast<unsigned>(g.op == WarpOp::kMin ? least : most);
        } else if (!(f.mask >> g.source_lane & 1)) {
          error_ = where(g) + "it reads lane " + std::to_string(g.source_lane) +
                   ", which takes no part, at " + text_of(g.site);
          return false;
        } else {
          g.result = at(first + g.source_lane).value;
        }
      }
      const unsigned mask = f.mask;
      for (int k = 0; k < lanes; ++k) {
        if (mask >> k & 1) make_ready(at(first + k));
      }
      any = true;
    }
    return any;
  }

  void check_same_site(int begin, int end) {
    for (int i = begin + 1; i < end; ++i) {
      const Site a = at(begin).site, b = at(i).site;
      if (a.line != b.line || std::strcmp(a.file, b.file) != 0) {
        error_ = where(at(i)) + "divergent barrier: it waits at " + text_of(b) + ", others at " +
                 text_of(a);
        return;
      }
    }
  }

  std::string deadlock(int count) {
    std::string what = "deadlock:";
    int shown = 0;
    State last = State::kReady;
    for (int i = 0; i < count && shown < 4; ++i) {
      const Fiber& f = at(i);
      if (f.state == last) continue;
      last = f.state;
      ++shown;
      what += " " + where(f) +
              (f.state == State::kDone ? "has ended;"
               : f.state == State::kInWarpOperation
                   ? "waits in a warp operation at " + text_of(f.site) + ";"
                   : "waits at a barrier at " + text_of(f.site) + ";");
    }
    return error_.empty() ? what : error_;
  }

  std::string where(const Fiber& f) const {
    return text("block (%u, %u) thread %d: ", block_x_ + static_cast<unsigned>(f.id / threads_),
                block_y_, f.id % threads_);
  }

  bool block_done(unsigned rank) {
    for (int i = 0; i < threads_; ++i) {
      if (at(static_cast<int>(rank) * threads_ + i).state != State::kDone) return false;
    }
    return true;
  }

  Fiber& at(int id) { return fibers_[static_cast<std::size_t>(id)]; }

  [[noreturn]] void fail(const std::string& what) {
    if (error_.empty()) error_ = where(*current_) + what;
    // The fiber is left where it is: a stack that ends here owns nothing but what leaks.
    current_->state = State::kDone;
    leave(true);
    std::abort();
  }

  void wait(State state) {
    current_->state = state;
    leave(false);
  }

  // ---- switching

  void prepare(Fiber& f) {
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64);
    *--top = nullptr;  // the stack is 16-byte aligned where a function has just been called
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    f.stack_pointer = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &fiber_main, 0);
#endif
    f.asan_stack = nullptr;
  }

  void enter(Fiber& f) {
    current_ = &f;
    coordinates.thread = {static_cast<unsigned>(f.id % threads_), 0, 0};
    coordinates.block = {block_x_ + static_cast<unsigned>(f.id / threads_), block_y_, 0};
#if defined(GUMBEL_EXT_ASAN)
    __sanitizer_start_switch_fiber(&asan_stack_, f.stack, kStackBytes);
#endif
#if defined(__x86_64__)
    gumbel_ext_switch_fiber(&stack_pointer_, f.stack_pointer);
#else
    swapcontext(&context_, &f.context);
#endif
#if defined(GUMBEL_EXT_ASAN)
    __sanitizer_finish_switch_fiber(asan_stack_, nullptr, nullptr);
#endif
  }

  void leave(bool for_good) {
    Fiber& f = *current_;
#if defined(GUMBEL_EXT_ASAN)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &f.asan_stack, main_stack_, main_bytes_);
#else
    static_cast<void>(for_good);
#endif
#if defined(__x86_64__)
    gumbel_ext_switch_fiber(&f.stack_pointer, stack_pointer_);
#else
    swapcontext(&f.context, &context_);
#endif
#if defined(GUMBEL_EXT_ASAN)
    __sanitizer_finish_switch_fiber(f.asan_stack, nullptr, nullptr);
#endif
  }

 public:
  // The first thing that a fiber does: ASan tells it where it came from.
  void arrived() {
#if defined(GUMBEL_EXT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack_, &main_bytes_);
#endif
  }

 private:
  const std::function<void()>* kernel_ = nullptr;
  int threads_ = 0, cluster_ = 0, done_ = 0;
  unsigned block_x_ = 0, block_y_ = 0;
  std::uint32_t group_ = 0;
  bool in_round_ = false;
  std::vector<Fiber> fibers_;
  std::vector<Fiber*> ready_;
  Fiber* current_ = nullptr;
  std::vector<std::vector<SharedArray>> shared_;
  std::vector<std::uint32_t> epochs_;
  std::vector<int> arrived_;  // at each block's barrier and, last, the cluster's
  std::uint32_t cluster_epoch_ = 0;
  std::vector<std::pair<const char*, std::size_t>> forbidden_;
  std::string error_;
  std::mt19937 random_;
  RaceDetector races_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* asan_stack_ = nullptr;
  const void* main_stack_ = nullptr;
  std::size_t main_bytes_ = 0;
};

void fiber_main() {
  running->arrived();
  running->run_fiber();
}

Scheduler& scheduler() {
  static Scheduler scheduler;
  return scheduler;
}

// Whether a barrier lies between two accesses. Blocks of different clusters meet at none.
bool ordered(const Access& before, const Access& now) {
  if (before.thread < 0) return true;
  if (before.group != now.group) return false;
  if (before.thread == now.thread) return true;
  return before.block == now.block ? before.block_epoch != now.block_epoch
                                   : before.cluster_epoch != now.cluster_epoch;
}

void RaceDetector::access(const void* address, std::size_t size, bool write, const Access& now) {
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  for (std::uintptr_t byte = first; byte < first + size; ++byte) {
    ByteHistory& h = bytes_[byte];
    const Access* clash = nullptr;
    if (!ordered(h.write, now)) clash = &h.write;
    if (write && !ordered(h.read, now)) clash = &h.read;
    if (write && !ordered(h.other_read, now)) clash = &h.other_read;
    if (clash != nullptr && !found) {
      found = true;
      what = text(
          "race: thread %d of cluster %u and thread %d of cluster %u touch %p, one of them "
          "writes, and no barrier lies between",
          clash->thread, clash->group, now.thread, now.group, address);
    }
    if (write) {
      h.write = now;
      h.read = h.other_read = Access();
    } else {
      // Two readers are kept: whoever writes next races with at least one of them.
      if (h.read.thread != now.thread || h.read.group != now.group) h.other_read = h.read;
      h.read = now;
    }
  }
}

}  // namespace

void launch(dim3 grid, int threads, int cluster, const std::function<void()>& kernel) {
  // Host threads take turns; a kernel that launches one must not wait for itself, but be told.
  static std::recursive_mutex one_at_a_time;
  const std::lock_guard<std::recursive_mutex> lock(one_at_a_time);
  scheduler().launch(grid, threads, cluster, kernel);
}
void expect_aligned(const void* address, std::size_t bytes) {
  running->expect_aligned(address, bytes);
}
void forbid(const void* address, std::size_t bytes) { scheduler().forbid(address, bytes); }
void allow(const void* address) { scheduler().allow(address); }
void block_barrier(Site site) { running->block_barrier(site); }
void cluster_barrier(Site site) { running->cluster_barrier(site); }
unsigned warp_operation(WarpOp op, unsigned mask, unsigned value, int source_lane, Site site) {
  return running->warp_operation(op, mask, value, source_lane, site);
}
void* shared_array(const void* declaration, std::size_t bytes) {
  return running->shared_array(declaration, bytes);
}
const void* shared_array_of(const void* own, unsigned block_rank) {
  return running->shared_array_of(own, block_rank);
}
unsigned cluster_blocks() { return running->cluster_blocks(); }
unsigned cluster_rank() { return running->block_rank(); }
int lane() { return running->lane(); }

}  // namespace emulation
}  // namespace gumbel_ext

// ---- what -fsanitize=thread calls --------------------------------------------------------------

namespace {
void note(const void* address, std::size_t size, bool write) {
  using gumbel_ext::emulation::running;
  if (running != nullptr) running->memory_access(address, size, write);
}
}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define GUMBEL_EXT_HOOKS(bytes)                                         \
  void __tsan_read##bytes(void* a) { note(a, bytes, false); }           \
  void __tsan_write##bytes(void* a) { note(a, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* a) { note(a, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* a) { note(a, bytes, true); }
GUMBEL_EXT_HOOKS(1)
GUMBEL_EXT_HOOKS(2)
GUMBEL_EXT_HOOKS(4)
GUMBEL_EXT_HOOKS(8)
GUMBEL_EXT_HOOKS(16)
#undef GUMBEL_EXT_HOOKS
void __tsan_read_range(void* a, std::size_t bytes) { note(a, bytes, false); }
void __tsan_write_range(void* a, std::size_t bytes) { note(a, bytes, true); }
void* __tsan_memcpy(void* to, const void* from, std::size_t bytes) {
  note(from, bytes, false);
  note(to, bytes, true);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, std::size_t bytes) {
  note(to, bytes, true);
  return std::memset(to, value, bytes);
}
void* __tsan_memmove(void* to, const void* from, std::size_t bytes) {
  note(from, bytes, false);
  note(to, bytes, true);
  return std::memmove(to, from, bytes);
}
}
