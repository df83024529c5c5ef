// The numbers that parameters start from: each is a pure function of a key and of the element's flat index in the whole
// parameter, the same to the bit on a CPU and on a GPU. The readable twin is megamug/models/random_numbers.py.
//
// Nothing but integers and single additions, products, quotients and square roots of doubles, each rounded once, in one
// order: a fused multiply-add would give other bits. CUDA is told so by intrinsics, C++ compilers by -ffp-contract=off.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEGAMUG_HERE __device__ inline
#else
#include <cmath>
#define MEGAMUG_HERE inline
#endif

namespace megamug {

constexpr int kMaxAxes = 8;
constexpr int kWords = 4;  // numbers of one counter

// What is drawn of the uniform s in (-1, 1): scale s, or scale Phi^-1(1/2 + mass s), which lies between the quantiles
// 1/2 - mass and 1/2 + mass of the standard normal distribution.
struct Distribution {
  uint32_t key[2];
  bool normal;
  double scale, mass;
};

// The part of a whole parameter (C order) that a tensor holds: `rows` runs of `run` neighbours.
struct Slice {
  int64_t rows, run, origin;
  int axes;  // of the rows
  int64_t size[kMaxAxes], stride[kMaxAxes];
};

#ifdef __CUDACC__
#define MEGAMUG_BOTH __host__ __device__ inline
#else
#define MEGAMUG_BOTH inline
#endif

// The flat index in the whole parameter of the first element of a row.
MEGAMUG_BOTH int64_t start_of(const Slice& s, int64_t row) {
  int64_t at = s.origin;
  for (int a = s.axes - 1; a > 0; a--) {
    at += row % s.size[a] * s.stride[a];
    row /= s.size[a];
  }
  return s.axes ? at + row * s.stride[0] : at;
}

#ifdef __CUDACC__
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double sum(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double quotient(double a, double b) { return __ddiv_rn(a, b); }
__device__ inline double square_root(double a) { return __dsqrt_rn(a); }
#else
inline double product(double a, double b) { return a * b; }
inline double sum(double a, double b) { return a + b; }
inline double quotient(double a, double b) { return a / b; }
inline double square_root(double a) { return std::sqrt(a); }
#endif

// One round of Philox 4x32 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in
// place, and the keys of the next one; ten rounds turn a counter into four random words.
constexpr int kRounds = 10;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;

MEGAMUG_HERE void philox_round(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t key0, uint32_t key1) {
  const uint64_t first = uint64_t{0xD2511F53u} * a, second = uint64_t{0xCD9E8D57u} * c;
  a = static_cast<uint32_t>(second >> 32) ^ b ^ key0;
  b = static_cast<uint32_t>(second);
  c = static_cast<uint32_t>(first >> 32) ^ d ^ key1;
  d = static_cast<uint32_t>(first);
}

// (2 word + 1) / 2^32 - 1: in (-1, 1), never 0, as likely as its opposite. Exact.
MEGAMUG_HERE double symmetric(uint32_t word) {
  return sum(product(static_cast<double>(static_cast<int32_t>(word ^ 0x80000000u)), 0x1p-31), 0x1p-32);
}

// The inverse of the normal distribution function: algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988), to
// 1e-16. Of its three ranges the outermost, below 1.4e-11, is beyond what 32 bits reach.
constexpr double kCentral = 0.425, kCentralSquare = 0.180625, kTailShift = 1.6;

template <int n>
MEGAMUG_HERE double polynomial(const double (&coefficients)[n], double x) {
  double result = coefficients[n - 1];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = n - 2; i >= 0; i--) result = sum(product(result, x), coefficients[i]);
  return result;
}

// |q| <= kCentral -> Phi^-1(1/2 + q)
MEGAMUG_HERE double central_quantile(double q) {
  constexpr double above[] = {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
                              1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                              3.3430575583588128105e4, 2.5090809287301226727e3};
  constexpr double below[] = {1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
                              2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
                              5.2264952788528545610e3};
  const double r = sum(kCentralSquare, -product(q, q));
  return quotient(product(q, polynomial(above, r)), polynomial(below, r));
}

// -log(p) of a normal p < 1/2: p = m 2^e, sqrt(1/2) <= m < sqrt(2), log(m) = 2 artanh((m - 1) / (m + 1)) by its series.
MEGAMUG_HERE double minus_log(double p) {
  constexpr double series[] = {1.0, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11,
                               1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  constexpr uint64_t mantissa = (uint64_t{1} << 52) - 1, one = uint64_t{1023} << 52, half = uint64_t{1022} << 52;
  constexpr uint64_t sqrt2 = 0x6A09E667F3BCDu;  // mantissa of sqrt(2)
  uint64_t bits;
  memcpy(&bits, &p, sizeof bits);
  const bool upper = (bits & mantissa) >= sqrt2;
  const double e = static_cast<double>(static_cast<int32_t>(bits >> 52) - (upper ? 1022 : 1023));
  bits = (bits & mantissa) | (upper ? half : one);
  double m;
  memcpy(&m, &bits, sizeof m);
  const double s = quotient(sum(m, -1.0), sum(m, 1.0));
  const double log_m = product(product(2.0, s), polynomial(series, product(s, s)));
  return -sum(product(e, 0.69314718055994530942), log_m);
}

// kCentral < |q| < 1/2 -> |Phi^-1(1/2 + q)|
MEGAMUG_HERE double tail_quantile(double magnitude) {
  constexpr double above[] = {1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
                              3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
                              2.27238449892691845833e-2, 7.74545014278341407640e-4};
  constexpr double below[] = {1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
                              1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
                              1.05075007164441684324e-9};
  const double r = sum(square_root(minus_log(sum(0.5, -magnitude))), -kTailShift);
  return quotient(polynomial(above, r), polynomial(below, r));
}

}  // namespace megamug
