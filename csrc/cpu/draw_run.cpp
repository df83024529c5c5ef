// Numbers of a run of neighbours, in loops that compilers turn into vectors. FUNCTION is `draw_run_` and the name of an
// instruction set; all of them give the same bits, for the reason said in draw.h.
#include "draw_run.h"

namespace megamug {
namespace {

constexpr int64_t kBlocks = kRun / kWords + 1;  // counters that a run touches at most

// Words of the counters first, first + 1, ...: four a counter, in order.
void fill_words(const Distribution& d, uint64_t first, int64_t blocks, uint32_t* words) {
  uint32_t a[kBlocks], b[kBlocks], c[kBlocks] = {}, e[kBlocks] = {};
  for (int64_t i = 0; i < blocks; i++) {
    a[i] = static_cast<uint32_t>(first + i);
    b[i] = static_cast<uint32_t>((first + i) >> 32);
  }
  uint32_t key0 = d.key[0], key1 = d.key[1];
  for (int round = 0; round < kRounds; round++, key0 += kKeyStep0, key1 += kKeyStep1)
    for (int64_t i = 0; i < blocks; i++) philox_round(a[i], b[i], c[i], e[i], key0, key1);
  for (int64_t i = 0; i < blocks; i++) {
    words[kWords * i] = a[i], words[kWords * i + 1] = b[i];
    words[kWords * i + 2] = c[i], words[kWords * i + 3] = e[i];
  }
}

// q in (-1/2, 1/2) -> Phi^-1(1/2 + q): all as if central, then the 15% that are not, gathered.
void fill_quantiles(const double* q, int64_t count, double* z) {
  double magnitude[kRun], tails[kRun];
  int32_t place[kRun];
  int64_t found = 0;
  for (int64_t i = 0; i < count; i++) z[i] = central_quantile(q[i]);
  for (int64_t i = 0; i < count; i++) {
    place[found] = static_cast<int32_t>(i);
    magnitude[found] = std::fabs(q[i]);
    found += magnitude[found] > kCentral;
  }
  for (int64_t i = 0; i < found; i++) tails[i] = tail_quantile(magnitude[i]);
  for (int64_t i = 0; i < found; i++) z[place[i]] = std::copysign(tails[i], q[place[i]]);
}

uint16_t to_bfloat16(float x) {  // to nearest, ties to even; x is finite
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

void FUNCTION(const Distribution& d, int64_t first, int64_t count, bool bfloat16, void* out) {
  uint32_t words[kBlocks * kWords];
  double q[kRun], z[kRun];
  const int64_t block = first / kWords, before = first % kWords;
  fill_words(d, static_cast<uint64_t>(block), (before + count + kWords - 1) / kWords, words);
  for (int64_t i = 0; i < count; i++) z[i] = symmetric(words[before + i]);
  if (d.normal) {
    for (int64_t i = 0; i < count; i++) q[i] = product(z[i], d.mass);
    fill_quantiles(q, count, z);
  }
  const double scale = d.scale;
  if (bfloat16) {
    auto* p = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < count; i++) p[i] = to_bfloat16(static_cast<float>(product(z[i], scale)));
  } else {
    auto* p = static_cast<float*>(out);
    for (int64_t i = 0; i < count; i++) p[i] = static_cast<float>(product(z[i], scale));
  }
}

}  // namespace megamug
