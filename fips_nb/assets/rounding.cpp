// The inner loop of rounding with error feedback, for fips_nb/round/rounding.py: inputs [start, end) of a weight W (in x out), from the last to the first.
// E (end - start x out) and codes (in x out) are written; ahead (in x out) holds what the inputs beyond end have left; N (in x in) is lower triangular with a unit diagonal.
// A code is the nearest one or, with lengths (classes x (span + 2)), the best of three by squared error in steps and price*length; products are not fused with sums.
#if defined(__clang__)
#pragma clang fp contract(off)
#define UNFUSED ONCE
#else
#define UNFUSED __attribute__((noinline, optimize("fp-contract=off")))
#endif
namespace {
struct Sweep {
  const float *W, *N, *ahead, *row_steps, *steps, *lengths; const int16_t *rows, *columns; float* E; int16_t* codes;
  int64_t start, end, in, out; int low, high, span; float price;
};
constexpr int64_t LANES_OUT = 32, BLOCK_IN = 64;
UNFUSED void sweep_some(const Sweep& s, int64_t o0, int64_t n) {
  float near[BLOCK_IN][LANES_OUT], e[LANES_OUT], z[LANES_OUT], q[LANES_OUT], best[LANES_OUT];
  for (int64_t k = s.start; k < s.end; k++) memcpy(near[k-s.start], s.ahead + k*s.out + o0, n*sizeof(float));
  for (int64_t i = s.end - 1; i >= s.start; i--) {
    const float *w = s.W + i*s.out + o0, *r = s.row_steps + o0, step = s.steps[i]; const float* own = near[i-s.start];
    for (int64_t o = 0; o < n; o++) {
      z[o] = (w[o] + own[o])/(r[o]*step);
      q[o] = min(max(__builtin_nearbyintf(z[o]), -32767.f), 32767.f);
    }
    if (s.lengths) for (int64_t o = 0; o < n; o++) {
      const int number = min(max(int(s.rows[o0+o]) + int(s.columns[i]), s.low), s.high) - s.low;
      const float* l = s.lengths + int64_t(s.span + 2)*number;
      const float option[3] = {q[o], q[o] + (z[o] >= q[o] ? 1.f : -1.f), 0.f};
      float least = 0; best[o] = option[0];
      for (int j = 0; j < 3; j++) {
        const float d = z[o] - option[j], size = option[j] < 0 ? -option[j] : option[j];
        const float cost = d*d + s.price*l[size < float(s.span + 1) ? int(size) : s.span + 1];
        if (j == 0 || cost < least) { least = cost; best[o] = option[j]; }
      }
    } else memcpy(best, q, sizeof(q));
    float* Ei = s.E + (i - s.start)*s.out + o0; int16_t* ci = s.codes + i*s.out + o0;
    for (int64_t o = 0; o < n; o++) { ci[o] = int16_t(best[o]); e[o] = w[o] - best[o]*(r[o]*step); Ei[o] = e[o]; }
    const float* Ni = s.N + i*s.in + s.start;
    for (int64_t k = 0; k < i - s.start; k++) { const float f = Ni[k]; float* p = near[k]; for (int64_t o = 0; o < n; o++) p[o] += f*e[o]; }
  }
}
}
extern "C" void fips_sweep(const float* W, const float* N, const float* ahead, const float* row_steps, const float* steps, const float* lengths,
                           const int16_t* rows, const int16_t* columns, float* E, int16_t* codes, int64_t start, int64_t end, int64_t in, int64_t out,
                           int low, int high, int span, float price, int threads) {
  const Sweep s{W, N, ahead, row_steps, steps, lengths, rows, columns, E, codes, start, end, in, out, low, high, span, price};
  parallel((out + LANES_OUT - 1)/LANES_OUT, threads, [=](int64_t b) { sweep_some(s, b*LANES_OUT, min(LANES_OUT, out - b*LANES_OUT)); });
}
