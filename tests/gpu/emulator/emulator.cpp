#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_runtime_api.h"

namespace emulated {
namespace {

enum class State { kReady, kAtWarp, kAtBlock, kDone };

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kLanes = 32;

struct Thread {
  ucontext_t start;
  jmp_buf place;
  State state;
  bool has_begun;
  dim3 index{0};
  uint64_t given;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<char> stacks;
  const std::function<void()>* kernel = nullptr;
  Place place;
  unsigned running = 0;
  jmp_buf scheduler;
  uint64_t random = 88172645463325252ull;
};

// Launches of several host threads do not share a block.
thread_local Block block;

uint64_t next_random() {
  block.random ^= block.random << 13;
  block.random ^= block.random >> 7;
  block.random ^= block.random << 17;
  return block.random;
}

Thread& running() { return block.threads[block.running]; }

// makecontext takes no argument: the thread is the one that runs.
void begin() {
  (*block.kernel)();
  running().state = State::kDone;
  _longjmp(block.scheduler, 1);
}

void wait(State state) {
  running().state = state;
  if (_setjmp(running().place) == 0) _longjmp(block.scheduler, 1);
}

void run(unsigned index) {
  block.running = index;
  block.place.thread = running().index;
  if (_setjmp(block.scheduler) != 0) return;
  if (running().has_begun) _longjmp(running().place, 1);
  running().has_begun = true;
  setcontext(&running().start);
}

// Lets threads go on that all wait for each other; returns whether any can.
bool release(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (block.threads[i].state != state) return false;
  }
  for (size_t i = first; i < last; ++i) block.threads[i].state = State::kReady;
  return true;
}

void run_block() {
  const size_t count = block.threads.size();
  for (;;) {
    // From somewhere on, forwards or backwards.
    const uint64_t random = next_random();
    const size_t from = random % count, step = random >> 40 & 1 ? 1 : count - 1;
    bool any_ran = false, all_done = true;
    for (size_t i = 0, index = from; i < count; ++i, index = (index + step) % count) {
      if (block.threads[index].state == State::kReady) {
        run(static_cast<unsigned>(index));
        any_ran = true;
      }
      all_done = all_done && block.threads[index].state == State::kDone;
    }
    if (all_done) return;
    bool any_released = release(0, count, State::kAtBlock);
    for (size_t first = 0; first < count; first += kLanes) {
      const size_t last = first + kLanes < count ? first + kLanes : count;
      any_released = release(first, last, State::kAtWarp) || any_released;
    }
    if (!any_ran && !any_released) {
      fprintf(stderr, "a barrier that not all threads come to\n");
      abort();
    }
  }
}

}  // namespace

Place& here() { return block.place; }

unsigned lane() { return block.running % kLanes; }

void wait_for_block() { wait(State::kAtBlock); }
void wait_for_warp() { wait(State::kAtWarp); }

uint64_t exchange(uint64_t mine, unsigned source) {
  running().given = mine;
  wait_for_warp();
  const uint64_t result = block.threads[block.running / kLanes * kLanes + source].given;
  wait_for_warp();  // until here the value may be taken
  return result;
}

void launch(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  block.threads.resize(count);
  block.stacks.resize(count * kStackBytes);
  block.kernel = &kernel;
  block.place.threads = threads;
  block.place.grid = grid;
  for (unsigned number = 0; number < grid.x; ++number) {
    block.place.block = dim3(number, 0, 0);
    for (size_t i = 0; i < count; ++i) {
      Thread& thread = block.threads[i];
      thread.state = State::kReady;
      thread.has_begun = false;
      const auto index = static_cast<unsigned>(i);
      thread.index = dim3(index % threads.x, index / threads.x % threads.y, 0);
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = block.stacks.data() + i * kStackBytes;
      thread.start.uc_stack.ss_size = kStackBytes;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, begin, 0);
    }
    run_block();
  }
}

}  // namespace emulated
