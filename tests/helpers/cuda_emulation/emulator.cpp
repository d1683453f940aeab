// Runs kernels on the CPU. Every thread of a block is a fiber with a stack of its own; it runs
// until it waits for others (a barrier, a shuffle) or returns, and then the next one runs. The
// order is a choice (`schedule`), so that a missing barrier shows in one order or another.
//
// Undefined behaviour that the compiler's checks find, and accesses to memory that is not there,
// end the launch like the emulator's own findings. Fibers that are in the middle then are
// abandoned.
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks

#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_emulation {

unsigned schedule = 0;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMostThreads = 1024;

enum class State { kReady, kAtBarrier, kInWarp, kReturned };

struct Fiber {
  char* stack = nullptr;
  bool started = false;  // its loop runs: `place` is valid
  jmp_buf place;
  State state = State::kReturned;
  uint3 index;
  // What it waits for.
  Site site;
  Collective collective;
  unsigned mask;
  uint64_t value;
  int source;
};

std::mutex one_launch;
std::vector<std::unique_ptr<Fiber>> fibers;  // of any block; kept, with their stacks
int thread_count = 0;                        // of the current block
Fiber* current = nullptr;
const std::function<void()>* kernel = nullptr;
jmp_buf scheduler;
std::string failure;
std::mt19937 random_bits;

int number_of(const Fiber& fiber) {
  return int(fiber.index.x + blockDim.x * (fiber.index.y + blockDim.y * fiber.index.z));
}

std::string name_of(const char* what, const uint3& index) {
  return std::string(what) + " (" + std::to_string(index.x) + ", " + std::to_string(index.y) +
         ", " + std::to_string(index.z) + ")";
}

std::string name_of(const Fiber& fiber) { return name_of("thread", fiber.index); }

std::string name_of(const Site& site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string doing(const Fiber& fiber) {
  if (fiber.state == State::kReturned) return name_of(fiber) + " has returned";
  std::string what = "__syncthreads";
  if (fiber.state == State::kInWarp) {
    what = fiber.collective == Collective::kShuffle  ? "a shuffle"
           : fiber.collective == Collective::kBallot ? "__ballot_sync"
                                                     : "__syncwarp";
    char mask[32];
    std::snprintf(mask, sizeof mask, " of mask 0x%08x", fiber.mask);
    what += mask;
  }
  return name_of(fiber) + " waits in " + what + " at " + name_of(fiber.site);
}

void note_failure(const std::string& what) { failure = name_of("block", blockIdx) + ": " + what; }

[[noreturn]] void back_to_scheduler() { _longjmp(scheduler, 1); }

// Lets others run until someone makes this thread ready again.
void wait() {
  Fiber& mine = *current;
  if (_setjmp(mine.place) == 0) back_to_scheduler();
}

void fiber_loop() {
  for (;;) {
    (*kernel)();
    current->state = State::kReturned;
    wait();
  }
}

// Runs a thread until it waits or returns.
void run(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &fiber_loop, 0);
    setcontext(&context);
  }
  current = nullptr;
}

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

// Both wait in the same call for the same lanes.
bool meet(const Fiber& a, const Fiber& b) {
  return a.state == State::kInWarp && b.state == State::kInWarp && a.collective == b.collective &&
         a.mask == b.mask && same_place(a.site, b.site);
}

struct Warp {
  int first;  // thread
  int lanes;
  explicit Warp(const Fiber& member)
      : first(number_of(member) / 32 * 32), lanes(std::min(32, thread_count - first)) {}
  Fiber& lane(int i) const { return *fibers[first + i]; }
};

// The first lane that `waiting` has to wait for, or none. As on devices since Volta, lanes that
// have returned are not waited for.
const Fiber* missing_lane(const Fiber& waiting) {
  const Warp warp(waiting);
  for (int i = 0; i < warp.lanes; ++i) {
    const Fiber& other = warp.lane(i);
    if ((waiting.mask >> i & 1u) != 0 && other.state != State::kReturned && !meet(waiting, other))
      return &other;
  }
  return nullptr;
}

// Gives the lanes that wait with this one what they wait for, if all have come.
void finish_collective(const Fiber& waiting) {
  if (missing_lane(waiting) != nullptr) return;
  const Warp warp(waiting);
  unsigned present = 0;
  unsigned ballot = 0;
  for (int i = 0; i < warp.lanes; ++i) {
    if ((waiting.mask >> i & 1u) == 0 || warp.lane(i).state == State::kReturned) continue;
    present |= 1u << i;
    if (warp.lane(i).value != 0) ballot |= 1u << i;
  }
  uint64_t results[32];
  for (int i = 0; i < warp.lanes; ++i) {
    results[i] = ballot;
    if ((present >> i & 1u) == 0 || waiting.collective != Collective::kShuffle) continue;
    const int source = warp.lane(i).source;
    if ((present >> source & 1u) == 0)
      return note_failure(doing(warp.lane(i)) + " for lane " + std::to_string(source) +
                          ", which takes no part");
    results[i] = warp.lane(source).value;
  }
  for (int i = 0; i < warp.lanes; ++i) {
    if ((present >> i & 1u) == 0) continue;
    warp.lane(i).value = results[i];
    warp.lane(i).state = State::kReady;
  }
}

// No thread can go on by itself. Opens the barrier that all wait at, or says why there is none.
// Devices let a barrier pass without threads that have returned, CUDA's rules do not: it has to be
// the same for the whole block.
void finish_barrier() {
  const auto end = fibers.begin() + thread_count;
  const Fiber& waiting =
      **std::find_if(fibers.begin(), end, [](auto& f) { return f->state != State::kReturned; });
  if (waiting.state == State::kInWarp)
    return note_failure(doing(waiting) + ", but " + doing(*missing_lane(waiting)));
  const auto other = std::find_if(fibers.begin(), end, [&](auto& f) {
    return f->state != State::kAtBarrier || !same_place(f->site, waiting.site);
  });
  if (other != end) return note_failure(doing(waiting) + ", but " + doing(**other));
  for (auto fiber = fibers.begin(); fiber != end; ++fiber) (*fiber)->state = State::kReady;
}

template <class T>
void put_in_order(std::vector<T>& order) {
  std::iota(order.begin(), order.end(), T(0));
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), random_bits);
}

// False where it failed.
bool run_block() {
  for (int i = 0; i < thread_count; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned u = unsigned(i);
    fiber.index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / (blockDim.x * blockDim.y)};
    fiber.state = State::kReady;
  }
  std::vector<int> order(thread_count);
  for (int returned = 0; returned < thread_count;) {
    put_in_order(order);
    bool ran = false;
    for (int i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.state != State::kReady) continue;
      ran = true;
      run(fiber);
      if (failure.empty() && fiber.state == State::kInWarp) finish_collective(fiber);
      if (fiber.state == State::kReturned) {
        ++returned;
        const Warp warp(fiber);  // may have waited for nobody else
        for (int j = 0; j < warp.lanes && failure.empty(); ++j) {
          if (warp.lane(j).state == State::kInWarp) finish_collective(warp.lane(j));
        }
      }
      if (!failure.empty()) return false;
    }
    if (!ran) finish_barrier();
    if (!failure.empty()) return false;
  }
  return true;
}

void have_fibers(int count) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  while (int(fibers.size()) < count) {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
    mprotect(memory, page, PROT_NONE);  // what overflows shall not write to the next stack
    fiber->stack = static_cast<char*>(memory) + page;
    fibers.push_back(std::move(fiber));
  }
}

// Turns accesses to unmapped memory into failures while it lives.
class CatchBadAccesses {
 public:
  CatchBadAccesses() {
    stack_t alternative = {};  // the fiber's own may have overflowed
    alternative.ss_sp = stack_;
    alternative.ss_size = sizeof stack_;
    sigaltstack(&alternative, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // it is left by longjmp
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~CatchBadAccesses() {
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static void handle(int number, siginfo_t* info, void*) {
    if (current == nullptr) {
      signal(number, SIG_DFL);
      return;
    }
    const char* at = static_cast<char*>(info->si_addr);
    const bool stack = at < current->stack + kStackBytes && at >= current->stack - 4096;
    note_failure(name_of(*current) + (stack ? ": stack overflow" : ": illegal memory access"));
    back_to_scheduler();
  }

  char stack_[64 * 1024];
  stack_t old_stack_;
  struct sigaction old_segv_;
  struct sigaction old_bus_;
};

bool is_possible(const cudaLaunchConfig_t& config) {
  const dim3& g = config.gridDim;
  const dim3& b = config.blockDim;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  return g.x > 0 && g.y > 0 && g.z > 0 && g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535 &&
         threads > 0 && threads <= kMostThreads && b.z <= 64;
}

}  // namespace

void fail(const char* what, const Site& site) {
  if (current == nullptr) {  // host code: nowhere to go
    std::fprintf(stderr, "%s at %s:%d\n", what, site.file, site.line);
    std::abort();
  }
  note_failure(name_of(*current) + ": " + what + " at " + name_of(site));
  back_to_scheduler();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  if (!is_possible(config)) return noted(cudaErrorInvalidConfiguration);
  if (config.dynamicSmemBytes != 0 || config.numAttrs != 0) return noted(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> locked(one_launch);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  thread_count = int(blockDim.x * blockDim.y * blockDim.z);
  have_fibers(thread_count);
  kernel = &body;
  failure.clear();
  random_bits.seed(schedule);
  std::vector<uint64_t> blocks(uint64_t(gridDim.x) * gridDim.y * gridDim.z);
  put_in_order(blocks);
  const CatchBadAccesses catching;
  for (uint64_t block : blocks) {
    blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
                unsigned(block / gridDim.x / gridDim.y)};
    if (run_block()) continue;
    for (auto& fiber : fibers) fiber->started = false;
    throw std::runtime_error("emulated kernel: " + failure);
  }
  return cudaSuccess;
}

void sync_block(Site site) {
  current->state = State::kAtBarrier;
  current->site = site;
  wait();
}

uint64_t sync_warp(Collective what, unsigned mask, uint64_t value, int source, Site site) {
  if ((mask >> lane() & 1u) == 0) fail("a lane outside its own mask", site);
  current->state = State::kInWarp;
  current->site = site;
  current->collective = what;
  current->mask = mask;
  current->value = value;
  current->source = source;
  wait();
  return current->value;
}

int lane() { return number_of(*current) % 32; }

void require_aligned(const void* address, size_t alignment, Site site) {
  if (address == nullptr || reinterpret_cast<uintptr_t>(address) % alignment != 0)
    fail("misaligned or null address", site);
}

}  // namespace cuda_emulation
