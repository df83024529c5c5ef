// What a warp does together on sm_80 and later: matrix products, 8 x 8 matrices out of shared memory, copies into it
// that nobody waits for. `attention.cuh` is written on these alone, so that tests/emulation can run it on a CPU.
#pragma once

#include "common.cuh"

namespace megamug {

using Word = uint32_t;     // two 16-bit numbers, the first in the lower half
using Address = uint32_t;  // of a byte in shared memory

__device__ inline Address shared_address(const void* p) { return static_cast<Address>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices. Lane 8 i + r gives the address of row r of matrix i; lane l gets numbers 2 (l % 4) and the next
// one of row l / 4 of each, or (transposed) of column l / 4.
__device__ inline void load_matrices(Word (&m)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_transposed(Word (&m)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]. Of lane l, g = l / 4 and t = 2 (l % 4): a = rows (g, g + 8, g, g + 8), columns t
// and t + 1 (the last two words: t + 8, t + 9); b = rows t and t + 1 (t + 8, t + 9) of column g; c = row g, columns t
// and t + 1, then row g + 8. So the c of two neighbouring products, rounded, are the a of another one.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const Word (&a)[4], Word b0, Word b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ inline Word pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const Word*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const Word*>(&pair);
  }
}
template <class T>
__device__ inline float2 unpack(Word pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  else
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// 16 bytes on their way to shared memory, or zeros if there is nothing to copy.
__device__ inline void copy_async(void* target, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x and log2(x) by the special-function unit: relative error 2^-22, absolute error 2^-22 (log2 near 1).
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float log2_approximate(float x) {
  float result;
  asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A number that all lanes of a warp have, told to the compiler: it then goes into the warp's own registers.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

}  // namespace megamug
