// One block of a CUDA kernel on a CPU, well enough to check its arithmetic of indices: what `csrc/cuda/warp.cuh`
// offers, by the words of the PTX manual (ldmatrix, mma.m16n8k16), for kernels that are written on it alone.
//
// Each thread is a fiber; a warp runs until all of it waits at a barrier of the block, then the next one does, from the
// first to the last or the other way round: what one warp overwrites too early is seen in one of the two orders. Copies
// happen when they are waited for. Shared memory begins as NaN.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<std::function<void()>> copies;
};

struct Warp {
  const void* in[32];
  void* out[32];
  int arrived = 0;
  uint64_t generation = 0;
  int at_barrier = 0;
};

constexpr size_t kStack = 256 * 1024;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline int waiting = 0;
inline uint64_t barriers = 0;
inline int64_t conflicts = 0;  // of ldmatrix: two rows of a matrix in one bank
inline char* shared_start = nullptr;
inline int64_t shared_bytes = 0;

inline void yield() {
  const unsigned me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
}

inline void entry() {
  kernel();
  fibers[threadIdx.x].done = true;
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// What all lanes of a warp do together: the last one to arrive does it, from everybody's `in` to everybody's `out`.
inline void together(const void* in, void* out, const std::function<void(Warp&)>& act) {
  Warp& warp = warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  warp.in[lane] = in;
  warp.out[lane] = out;
  const uint64_t generation = warp.generation;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    warp.generation++;
    act(warp);
    return;
  }
  while (warp.generation == generation) yield();
}

inline void barrier() {
  const uint64_t before = barriers;
  if (++waiting == static_cast<int>(fibers.size())) {
    waiting = 0;
    barriers++;
    return;
  }
  warps[threadIdx.x / 32].at_barrier++;
  while (barriers == before) yield();
  warps[threadIdx.x / 32].at_barrier--;
}

// Runs `body` as every thread of block `block`. `descending`: the last warp first.
inline void run(unsigned block, int threads, bool descending, std::function<void()> body) {
  kernel = std::move(body);
  fibers = std::vector<Fiber>(threads);
  warps = std::vector<Warp>(threads / 32);
  waiting = 0;
  blockIdx.x = block;
  blockDim.x = threads;
  for (auto& f : fibers) {
    f.stack = std::make_unique<char[]>(kStack);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  const auto finished = [&](size_t w) {
    for (int l = 0; l < 32; l++)
      if (!fibers[w * 32 + l].done) return false;
    return true;
  };
  for (size_t left = warps.size(), idle = 0; left;) {
    left = 0;
    for (size_t i = 0; i < warps.size(); i++) {
      const size_t w = descending ? warps.size() - 1 - i : i;
      const uint64_t before = barriers;
      // until the whole warp waits for others, or is at its end
      for (int round = 0; !finished(w) && (warps[w].at_barrier < 32 || barriers != before || round == 0); round++) {
        for (int l = 0; l < 32; l++) {
          if (fibers[w * 32 + l].done) continue;
          threadIdx.x = w * 32 + l;
          swapcontext(&scheduler, &fibers[w * 32 + l].context);
        }
        if (round > 10000000) fail("a warp never arrives");
        if (barriers != before) break;
      }
      left += !finished(w);
    }
    if (++idle > 100000) fail("deadlock");
  }
}

inline float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() {
  emulation::together(nullptr, nullptr, [](emulation::Warp&) {});
}

namespace megamug {

struct BFloat16 {
  uint16_t bits;
};

using Word = uint32_t;
using Address = uint32_t;

inline Address shared_address(const void* p) { return static_cast<const char*>(p) - emulation::shared_start; }

inline void load_matrices_of(Word (&m)[4], Address row, bool transposed) {
  emulation::together(&row, m, [transposed](emulation::Warp& warp) {
    for (int i = 0; i < 4; i++) {
      uint16_t matrix[8][8];
      unsigned used = 0;
      for (int r = 0; r < 8; r++) {
        const Address a = *static_cast<const Address*>(warp.in[8 * i + r]);
        if (a % 16 || a + 16 > emulation::shared_bytes) emulation::fail("ldmatrix outside, or not aligned");
        emulation::conflicts += used >> (a / 16 % 8) & 1;
        used |= 1u << (a / 16 % 8);
        std::memcpy(matrix[r], emulation::shared_start + a, 16);
      }
      for (int lane = 0; lane < 32; lane++) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const uint16_t low = transposed ? matrix[minor][major] : matrix[major][minor];
        const uint16_t high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
        static_cast<Word*>(warp.out[lane])[i] = low | static_cast<Word>(high) << 16;
      }
    }
  });
}
inline void load_matrices(Word (&m)[4], Address row) { load_matrices_of(m, row, false); }
inline void load_transposed(Word (&m)[4], Address row) { load_matrices_of(m, row, true); }

template <class T>
float2 unpack(Word pair) {
  return {emulation::bits_to_float(pair << 16), emulation::bits_to_float(pair & 0xffff0000u)};
}
inline uint16_t round_to_bfloat16(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
template <class T>
Word pack(float low, float high) {
  return round_to_bfloat16(low) | static_cast<Word>(round_to_bfloat16(high)) << 16;
}

// "Matrix fragments for mma.m16n8k16 with floating point type" of the PTX manual, element by element
template <class T>
void multiply_add(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
  struct In {
    const Word* a;
    Word b[2];
  } in{a, {b0, b1}};
  emulation::together(&in, c, [](emulation::Warp& warp) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const In& x = *static_cast<const In*>(warp.in[lane]);
      const int group = lane >> 2, in_group = lane % 4;
      for (int i = 0; i < 8; i++) {
        const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        const float2 pair = unpack<T>(x.a[i / 2]);
        left[row][column] = i % 2 ? pair.y : pair.x;
      }
      for (int i = 0; i < 4; i++) {
        const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), column = group;
        const float2 pair = unpack<T>(x.b[i / 2]);
        right[row][column] = i % 2 ? pair.y : pair.x;
      }
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
        float& sum = static_cast<float*>(warp.out[lane])[i];
        for (int k = 0; k < 16; k++) sum += left[row][k] * right[k][column];
      }
  });
}

inline void copy_async(void* target, const void* source, bool exists) {
  if (reinterpret_cast<uintptr_t>(source) % 16 || shared_address(target) % 16) emulation::fail("a copy is not aligned");
  if (shared_address(target) + 16 > emulation::shared_bytes) emulation::fail("a copy outside of shared memory");
  emulation::fibers[threadIdx.x].copies.push_back([=] {
    if (exists)
      std::memcpy(target, source, 16);
    else
      std::memset(target, 0, 16);
  });
}
inline void wait_for_copies() {
  for (auto& copy : emulation::fibers[threadIdx.x].copies) copy();
  emulation::fibers[threadIdx.x].copies.clear();
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float log2_approximate(float x) { return std::log2(x); }

inline int uniform(int x) { return x; }

inline float shuffle_xor(float x, int mask) {
  float result;
  emulation::together(&x, &result, [mask](emulation::Warp& warp) {
    for (int lane = 0; lane < 32; lane++)
      *static_cast<float*>(warp.out[lane]) = *static_cast<const float*>(warp.in[lane ^ mask]);
  });
  return result;
}

}  // namespace megamug
