#include "cuda_emulation.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <unordered_set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarp = 32;
constexpr size_t kDefaultSharedMemory = 48 << 10;

enum class State { ready, in_barrier, in_shuffle, returned };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::returned;
  int line = 0;               // of the barrier or shuffle in which it waits
  uint64_t lent[2] = {0, 0};  // to this shuffle and the last
  unsigned shuffles = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

std::vector<Fiber> fibers;
unsigned running = 0;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
void* shared = nullptr;
std::map<const void*, size_t> allowed_shared_memory;
std::unordered_set<const void*> read;  // by this launch
size_t bytes_read = 0;

#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void leave_scheduler(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), kStackBytes);
}
void enter_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
void leave_fiber(Fiber& fiber) {
  // Of a thread that returns, the sanitizer's stack is not needed again.
  __sanitizer_start_switch_fiber(fiber.state == State::returned ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_stack_bytes);
}
void enter_fiber(Fiber& fiber) {
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}
void renew_stack(Fiber& fiber) {
  fiber.fake_stack = nullptr;
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
}
#else
void leave_scheduler(Fiber&) {}
void enter_scheduler() {}
void leave_fiber(Fiber&) {}
void enter_fiber(Fiber&) {}
void renew_stack(Fiber&) {}
#endif

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, running, what);
  for (unsigned i = 0; i < fibers.size() && i < blockDim.x; ++i) {
    std::fprintf(stderr, " %u:%d@%d", i, static_cast<int>(fibers[i].state), fibers[i].line);
  }
  std::fprintf(stderr, "\n");
  std::exit(3);
}

void wait(State state, int line) {
  Fiber& fiber = fibers[running];
  fiber.state = state;
  fiber.line = line;
  leave_fiber(fiber);
  swapcontext(&fiber.context, &scheduler);
  enter_fiber(fiber);
}

void run_thread() {
  Fiber& fiber = fibers[running];
  enter_fiber(fiber);
  (*body)();
  fiber.state = State::returned;
  leave_fiber(fiber);
  setcontext(&scheduler);
}

void resume(unsigned index) {
  running = index;
  threadIdx = dim3(index, 0, 0);
  leave_scheduler(fibers[index]);
  swapcontext(&scheduler, &fibers[index].context);
  enter_scheduler();
}

/// Lets the threads from `first` to `last` go on, if they all wait in one place: where only some do, the others never
/// will.
bool release(State state, unsigned first, unsigned last) {
  unsigned waiting = 0;
  for (unsigned i = first; i < last; ++i) waiting += fibers[i].state == state;
  if (waiting == 0) return false;
  for (unsigned i = first; i < last; ++i) {
    running = i;
    if (fibers[i].state != state) fail("is not where other threads wait for it");
    if (fibers[i].line != fibers[first].line) fail("waits in another line");
  }
  for (unsigned i = first; i < last; ++i) fibers[i].state = State::ready;
  return true;
}

void prepare(Fiber& fiber) {
  renew_stack(fiber);
  fiber.shuffles = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
  fiber.state = State::ready;
}

void run_block() {
  const unsigned threads = blockDim.x;
  for (unsigned i = 0; i < threads; ++i) prepare(fibers[i]);
  bool released = true;
  while (released) {
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned index = device().reversed ? threads - 1 - i : i;
      if (fibers[index].state == State::ready) resume(index);
    }
    released = false;
    for (unsigned warp = 0; warp < threads; warp += kWarp) released |= release(State::in_shuffle, warp, warp + kWarp);
    if (!released) released = release(State::in_barrier, 0, threads);
  }
}

}  // namespace

Device& device() {
  static Device the_device;
  return the_device;
}

void* shared_memory() { return shared; }

void note_read(const void* at, size_t bytes) {
  if (device().counts_reads && read.insert(at).second) bytes_read += bytes;
}

void synchronize_block(int line) { wait(State::in_barrier, line); }

uint64_t shuffle_xor(uint64_t number, int mask, int line) {
  // Two places, so that a thread may lend the next number before all have read this one.
  const unsigned self = running, place = fibers[self].shuffles++ % 2;
  fibers[self].lent[place] = number;
  wait(State::in_shuffle, line);
  return fibers[self ^ static_cast<unsigned>(mask)].lent[place];
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes > device().shared_memory_limit) return cudaErrorInvalidValue;
  allowed_shared_memory[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t run(const void* kernel, const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto allowed = allowed_shared_memory.find(kernel);
  const size_t limit = allowed == allowed_shared_memory.end() ? kDefaultSharedMemory : allowed->second;
  if (shared_bytes > limit || grid.x == 0 || block.x == 0 || block.x % kWarp != 0) return cudaErrorInvalidValue;
  if (fibers.size() < block.x) fibers = std::vector<Fiber>(block.x);
  body = &thread;
  blockDim = block;
  gridDim = grid;
  read.clear();
  bytes_read = 0;
  for (unsigned index = 0; index < grid.x; ++index) {
    blockIdx = dim3(index, 0, 0);
    shared = std::malloc(shared_bytes);
    std::memset(shared, 0xff, shared_bytes);
    run_block();
    std::free(shared);
  }
  Dl_info symbol{};
  dladdr(kernel, &symbol);
  device().launches += symbol.dli_sname ? symbol.dli_sname : "?";
  for (const size_t number : {size_t(grid.x), size_t(block.x), shared_bytes, bytes_read}) {
    device().launches += ' ' + std::to_string(number);
  }
  device().launches += '\n';
  return cudaSuccess;
}

}  // namespace cuda_emulation
