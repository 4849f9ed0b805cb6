// Products of a sparse matrix A (out x in) with rows of inputs, for fips_nb/sparse_kernels.py, which compiles this file.
// Only vector extensions of g++ and clang++, and AVX-512 where the machine has it; threads are those of the OpenMP that torch has loaded.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__F16C__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
#define ONCE __attribute__((noinline)) // one copy, so that sums are rounded alike on one thread and on many
namespace {
using std::min; using std::max;
struct f16 { uint16_t u; }; struct bf16 { uint16_t u; }; // dtype codes: 0 float, 1 f16, 2 bf16

inline float get(const float* p) { return *p; }
inline float get(const bf16* p) { uint32_t u = uint32_t(p->u) << 16; float f; memcpy(&f, &u, 4); return f; }
inline void put(float* p, float f) { *p = f; }
inline void put(bf16* p, float f) {
  uint32_t u; memcpy(&u, &f, 4);
  p->u = f == f ? uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16) : 0x7fc0; // to nearest, ties to even
}
#if defined(__F16C__)
inline float get(const f16* p) { return _cvtsh_ss(p->u); }
inline void put(f16* p, float f) { p->u = _cvtss_sh(f, 0); }
#else
inline float get(const f16* p) { _Float16 h; memcpy(&h, p, 2); return float(h); }
inline void put(f16* p, float f) { _Float16 h = _Float16(f); memcpy(p, &h, 2); }
#endif
inline float get(const void* p, int dt, int64_t i) { return dt == 0 ? get((const float*)p + i) : dt == 1 ? get((const f16*)p + i) : get((const bf16*)p + i); }

#if defined(__AVX512F__)
constexpr int VL = 16, MAXW = 13; // floats in a vector; vectors of the register tile
#elif defined(__AVX__)
constexpr int VL = 8, MAXW = 6;
#else
constexpr int VL = 4, MAXW = 6;
#endif
typedef float vec __attribute__((vector_size(4*VL), aligned(4)));
typedef float vec4 __attribute__((vector_size(16), aligned(4)));

inline vec4 four(const float* p) { return *(const vec4*)p; }
inline vec4 four(const bf16* p) {
  typedef uint16_t half4 __attribute__((vector_size(8))); typedef uint32_t int4 __attribute__((vector_size(16)));
  half4 h; memcpy(&h, p, 8); return (vec4)(__builtin_convertvector(h, int4) << 16);
}
#if defined(__F16C__)
inline vec4 four(const f16* p) { return (vec4)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)); }
#else
inline vec4 four(const f16* p) { return vec4{get(p), get(p + 1), get(p + 2), get(p + 3)}; }
#endif

template<class F> void parallel(int64_t n, int threads, F f) { // f(i) for 0 <= i < n, whoever is free takes the next
  std::atomic<int64_t> next{0};
  auto work = [&] { for (int64_t i; (i = next++) < n;) f(i); };
  if (threads < 2 || n < 2 || !GOMP_parallel) return work();
  GOMP_parallel([](void* w) { (*static_cast<decltype(work)*>(w))(); }, &work, unsigned(min<int64_t>(n, threads)), 0);
}

// ---- inputs: columns of x (n x in) as rows of a transposed block of B floats, padded with zeros ----
template<class X> bool transpose_of(const X* x, int64_t stride, int64_t n, int64_t z0, int64_t z1, int64_t B, float* xt) {
  float bad = 0; // stays 0 unless an input is infinite or NaN
  for (int64_t s = 0; s < B; s += VL) for (int64_t z = z0; z < z1; z++) for (int l = 0; l < VL; l++) {
    float f = s + l < n ? get(x + (s + l)*stride + z) : 0.f; bad += f*0.f; xt[z*B + s + l] = f; }
  return bad != 0;
}
bool transpose(const void* x, int dt, int64_t at, int64_t stride, int64_t n, int64_t z0, int64_t z1, int64_t B, float* xt) {
  return dt == 0 ? transpose_of((const float*)x + at, stride, n, z0, z1, B, xt)
       : dt == 1 ? transpose_of((const f16*)x + at, stride, n, z0, z1, B, xt) : transpose_of((const bf16*)x + at, stride, n, z0, z1, B, xt);
}

// ---- many rows: each entry of A is broadcast and multiplies W vectors of the transposed inputs ----
template<int W> inline void load(vec* a, const float* p) { for (int j = 0; j < W; j++) a[j] = *(const vec*)(p + VL*j); }
template<int W> inline void store(const vec* a, float* p) { for (int j = 0; j < W; j++) *(vec*)(p + VL*j) = a[j]; }
template<int W> inline void axpy(vec* a, float v, const float* p) { for (int j = 0; j < W; j++) a[j] += v*(*(const vec*)(p + VL*j)); }

// A as CSR: values, 16-bit columns, row starts (or k entries in every row)
template<class V> struct Csr {
  const V* v; const uint16_t* c; const int32_t* p; int64_t k, out, in;
  static constexpr int ROWS = 32, TILE = 0;
  int64_t begin(int64_t r) const { return p ? p[r] : k*r; }
  int64_t entries() const { return begin(out); }
  template<int W> ONCE void rows(int64_t g, const float* xt, float* yt) const {
    for (int64_t r = ROWS*g; r < min(out, ROWS*(g + 1)); r++) {
      vec a[W] = {};
      for (int64_t e = begin(r); e < begin(r + 1); e++) axpy<W>(a, get(v + e), xt + int64_t(c[e])*VL*W);
      store<W>(a, yt + (r - ROWS*g)*VL*W); } }
  ONCE void one(int64_t g, const float* x, const uint16_t*, float* y) const { // one row of inputs: four gathered products at a time
    for (int64_t r = ROWS*g; r < min(out, ROWS*(g + 1)); r++) {
      vec4 a[4] = {}; int64_t e = begin(r), end = begin(r + 1);
      for (; e + 16 <= end; e += 16) for (int j = 0; j < 4; j++) {
        const uint16_t* q = c + e + 4*j; a[j] += vec4{x[q[0]], x[q[1]], x[q[2]], x[q[3]]}*four(v + e + 4*j); }
      vec4 b = (a[0] + a[1]) + (a[2] + a[3]); float s = (b[0] + b[1]) + (b[2] + b[3]);
      for (; e < end; e++) s += get(v + e)*x[c[e]];
      y[r - ROWS*g] = s; } }
};

// A in tiles of 32 outputs x 64 inputs. A tile takes as many steps as its fullest output has entries; a step holds a value and a column byte
// for each output, 255 beyond its last. The bytes stand in the order in which the two halves of looked-up words are joined again.
constexpr int ORDER[32] = {0,1,2,3,8,9,10,11,16,17,18,19,24,25,26,27, 4,5,6,7,12,13,14,15,20,21,22,23,28,29,30,31};
template<class V> struct Tiles {
  const V* v; const uint8_t* c; const int32_t* p; int64_t tiles, out, in; // p (groups x tiles + 1): first step of each tile
  static constexpr int ROWS = 32, TILE = 64;
  int64_t entries() const { return 32*int64_t(p[(out + 31)/32*tiles]); }
  template<int W> ONCE void tile(int64_t g, int64_t t, const float* xt, float* yt) const {
    const int64_t k = p[g*tiles + t], end = p[g*tiles + t + 1]; xt += 64*t*VL*W;
    for (int l = 0; l < 32; l++, yt += VL*W) {
      vec a[W]; if (t) load<W>(a, yt); else for (int j = 0; j < W; j++) a[j] = vec{};
      unsigned z;
      for (int64_t s = k; s < end && (z = c[32*s + ORDER[l]]) < 64; s++) axpy<W>(a, get(v + 32*s + l), xt + z*VL*W);
      store<W>(a, yt); } }
#if defined(__AVX512BW__)
  static __m512 val(const float* q) { return _mm512_loadu_ps(q); }
  static __m512 val(const f16* q) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)q)); }
  static __m512 val(const bf16* q) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)q)), 16)); }
  ONCE void one(int64_t g, const float*, const uint16_t* x, float* y) const {
    // one row of inputs; x holds, for each tile, 64 lower and then 64 upper half-words: four registers
    __m512 a[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(),
                   _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t t = 0; t < tiles; t++, x += 128) {
      const __m512i l0 = _mm512_loadu_si512(x), l1 = _mm512_loadu_si512(x + 32),
                    h0 = _mm512_loadu_si512(x + 64), h1 = _mm512_loadu_si512(x + 96);
      auto step = [&](int64_t s, __m512& a, __m512& b) { // 32 products
        const __m512i i =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(c + 32*s)));
        const __m512i lo = _mm512_permutex2var_epi16(l0, i, l1),
                      hi = _mm512_permutex2var_epi16(h0, i, h1);
        a = _mm512_fmadd_ps(val(v + 32*s), _mm512_castsi512_ps(_mm512_unpacklo_epi16(lo, hi)), a);
        b = _mm512_fmadd_ps(val(v + 32*s + 16),
                            _mm512_castsi512_ps(_mm512_unpackhi_epi16(lo, hi)), b);
      };
      int64_t s = p[g*tiles + t];
      const int64_t end = p[g*tiles + t + 1];
      for (; s + 2 <= end; s += 2) {
        step(s, a[0], a[1]);
        step(s + 1, a[2], a[3]);
      }
      if (s < end) step(s, a[0], a[1]);
    }
    _mm512_storeu_ps(y, _mm512_add_ps(a[0], a[2]));
    _mm512_storeu_ps(y + 16, _mm512_add_ps(a[1], a[3]));
  }
#else
  ONCE void one(int64_t g, const float* x, const uint16_t*, float* y) const {
    float a[32] = {};
    for (int64_t t = 0; t < tiles; t++) for (int64_t s = p[g*tiles + t]; s < p[g*tiles + t + 1]; s++)
      for (int l = 0; l < 32; l++) a[l] += get(v + 32*s + l)*x[64*t + (c[32*s + ORDER[l]] & 63)];
    memcpy(y, a, sizeof a); }
#endif
};

struct Call { // x (n x in) -> y (n x out), dtype dt; row strides; bias and its dtype
  const void* x; void* y; int dt; int64_t n, xs, ys; const void* bias; int bt, threads;
};
template<class Y> void write_as(const Call& q, Y* y, const float* acc, int64_t ra, int64_t o0, int64_t o1) {
  for (int64_t o = o0; o < o1; o++) put(y + o, acc[(o - o0)*ra] + (q.bias ? get(q.bias, q.bt, o) : 0.f));
}
void write(const Call& q, const float* acc, int64_t ra, int64_t o0, int64_t o1, int64_t r) { // y[r, o] = acc[(o - o0)*ra] + bias[o]
  if (q.dt == 0) write_as(q, (float*)q.y + r*q.ys, acc, ra, o0, o1);
  else if (q.dt == 1) write_as(q, (f16*)q.y + r*q.ys, acc, ra, o0, o1); else write_as(q, (bf16*)q.y + r*q.ys, acc, ra, o0, o1);
}
template<class X> float floats(const X* x, int64_t n, float* xf) { float bad = 0; for (int64_t z = 0; z < n; z++) { xf[z] = get(x + z); bad += xf[z]*0.f; } return bad; }
bool table(const Call& q, int64_t in, int64_t pad, float* xf, uint16_t* xw) { // rows as float, and their half-words tile by tile
  bool bad = false;
  for (int64_t r = 0; r < q.n; r++, xf += pad) {
    const int64_t at = r*q.xs;
    bad |= 0 != (q.dt == 0 ? floats((const float*)q.x + at, in, xf) : q.dt == 1 ? floats((const f16*)q.x + at, in, xf) : floats((const bf16*)q.x + at, in, xf));
    std::fill(xf + in, xf + pad, 0.f);
    if (xw) for (int64_t t = 0; t < pad; t += 64, xw += 128) for (int z = 0; z < 64; z++) {
      uint32_t u; memcpy(&u, xf + t + z, 4); xw[z] = uint16_t(u); xw[64 + z] = uint16_t(u >> 16); } }
  return bad;
}

template<class A> bool few(const A& m, const Call& q) { // row by row
  const int64_t in = (m.in + 63)/64*64, groups = (m.out + A::ROWS - 1)/A::ROWS, chunk = max<int64_t>(1, min<int64_t>(8, groups/(4*q.threads)));
  std::unique_ptr<float[]> xf(new float[in*q.n]); std::unique_ptr<uint16_t[]> xw(A::TILE ? new uint16_t[2*in*q.n] : nullptr);
  const bool bad = table(q, m.in, in, xf.get(), xw.get());
  parallel((groups + chunk - 1)/chunk, q.threads, [&](int64_t i) {
    for (int64_t r = 0; r < q.n; r++) for (int64_t g = i*chunk; g < min(groups, (i + 1)*chunk); g++) {
      float acc[A::ROWS]; m.one(g, xf.get() + r*in, xw.get() + (A::TILE ? 2*r*in : 0), acc);
      write(q, acc, 1, g*A::ROWS, min<int64_t>(m.out, (g + 1)*A::ROWS), r); } });
  return bad;
}

template<int W, class A> bool many(const A& m, const Call& q, int64_t r0, int64_t n) { // n rows from r0 on, in blocks of W vectors
  constexpr int64_t B = VL*W; const int64_t in = (m.in + 63)/64*64, groups = (m.out + A::ROWS - 1)/A::ROWS, blocks = (n + B - 1)/B;
  const int64_t chunk = A::TILE ? max<int64_t>(1, min<int64_t>(8, groups/(4*q.threads))) : 1;
  std::unique_ptr<float[]> xt(new float[blocks*in*B]); std::atomic<bool> bad{false};
  parallel(in/64, q.threads, [&](int64_t t) { for (int64_t b = 0; b < blocks; b++) {
    const int64_t z1 = min(m.in, 64*(t + 1)); float* xb = xt.get() + b*in*B;
    if (transpose(q.x, q.dt, (r0 + b*B)*q.xs, q.xs, n - b*B, 64*t, z1, B, xb)) bad = true;
    std::fill(xb + z1*B, xb + 64*(t + 1)*B, 0.f); } });
  parallel((groups + chunk - 1)/chunk, q.threads, [&](int64_t i) {
    const int64_t g0 = i*chunk, g1 = min(groups, g0 + chunk); std::unique_ptr<float[]> yt(new float[chunk*A::ROWS*B]);
    for (int64_t b = 0; b < blocks; b++) {
      const float* xb = xt.get() + b*in*B;
      if constexpr (A::TILE > 0) { for (int64_t t = 0; t < m.tiles; t++) for (int64_t g = g0; g < g1; g++) m.template tile<W>(g, t, xb, yt.get() + (g - g0)*A::ROWS*B); }
      else m.template rows<W>(g0, xb, yt.get());
      for (int64_t r = 0; r < min(B, n - b*B); r++) write(q, yt.get() + r, B, g0*A::ROWS, min<int64_t>(m.out, g1*A::ROWS), r0 + b*B + r); } });
  return bad;
}

template<class A> bool pick(int64_t w, const A& m, const Call& q, int64_t r0, int64_t n) {
  if (w <= 1) return many<1>(m, q, r0, n);
  if (w <= 2) return many<2>(m, q, r0, n);
  if (w <= 4) return many<4>(m, q, r0, n);
  if constexpr (MAXW > 6) {
    if (w > 10) return many<MAXW>(m, q, r0, n);
    if (w > 7) return many<10>(m, q, r0, n);
    if (w == 7) return many<7>(m, q, r0, n);
  }
  return many<6>(m, q, r0, n);
}
template<class A> int product(const A& m, Call q) {
  const int64_t grain = 1 << 21; // entries that a thread must have to do before it is worth calling: about 0.2 ms
#if defined(__AVX512BW__)
  constexpr int64_t FEW = A::TILE ? 32 : 3; // up to here row by row is faster
#else
  constexpr int64_t FEW = 3;
#endif
  q.threads = int(max<int64_t>(1, min<int64_t>(q.threads, q.n <= FEW ? m.entries()*q.n/grain : 4*m.entries()*((q.n + VL - 1)/VL)/grain)));
  if (q.n <= FEW) return few(m, q);
  const int64_t most = 4*VL*MAXW; bool bad = false; // rows at once, so that the transposed copy stays small
  for (int64_t r = 0; r < q.n; r += most) {
    const int64_t n = min(most, q.n - r), nv = (n + VL - 1)/VL, nb = (nv + MAXW - 1)/MAXW; bad |= pick((nv + nb - 1)/nb, m, q, r, n); }
  return bad;
}
} // namespace

extern "C" int fips_threads() { return GOMP_parallel != nullptr; }
// y (n x out) = x (n x in) A^T + bias; returns 1 if an input is infinite or NaN
#define ARGS int64_t k, int64_t out, int64_t in, const void* x, int dt, int64_t n, int64_t xs, void* y, int64_t ys, const void* bias, int bt, int threads
extern "C" int fips_csr(const void* v, int vt, const uint16_t* c, const int32_t* p, ARGS) { // k entries in every row if p is null
  const Call q{x, y, dt, n, xs, ys, bias, bt, threads};
  return vt == 0 ? product(Csr<float>{(const float*)v, c, p, k, out, in}, q) : vt == 1 ? product(Csr<f16>{(const f16*)v, c, p, k, out, in}, q)
       : product(Csr<bf16>{(const bf16*)v, c, p, k, out, in}, q);
}
extern "C" int fips_tiles(const void* v, int vt, const uint8_t* c, const int32_t* p, ARGS) { // k tiles for each group of outputs
  const Call q{x, y, dt, n, xs, ys, bias, bt, threads};
  return vt == 0 ? product(Tiles<float>{(const float*)v, c, p, k, out, in}, q) : vt == 1 ? product(Tiles<f16>{(const f16*)v, c, p, k, out, in}, q)
       : product(Tiles<bf16>{(const bf16*)v, c, p, k, out, in}, q);
}
