// A decoder and an encoder of coded matrices, for fips_nb/entropy_coding.py; compiled behind kernels.cpp, whose types it uses.
#include <vector>
namespace {
using std::vector;
// Interleaved ANS: symbol p belongs to lane p % lanes; states of 32 bits, words of 16, frequencies of 4096 in all.
// An entry of a table, one for each of 4096 slots: the code in 8 bits (-128: see escapes), its frequency less 1, and the slot's place in it.
struct Stream { const uint16_t* word; const uint16_t* end; uint32_t* state; int64_t lanes; const uint32_t* table; int low, high; const int16_t* escape; const int16_t* last; };
template<bool SAFE, class F> inline bool decode_row(Stream& s, int64_t first, int row, const int16_t* columns, int64_t n, F put) { // false at the end of the words
  const int64_t mask = s.lanes - 1; const uint16_t* w = s.word;
  for (int64_t i = 0; i < n; i++) {
    const int c = max(s.low, min(s.high, row + columns[i])) - s.low;
    uint32_t& state = s.state[(first + i) & mask]; uint32_t x = state;
    const uint32_t e = s.table[(int64_t(c) << 12) + (x & 4095)];
    x = ((e >> 8 & 4095) + 1)*(x >> 12) + (e >> 20);
    const bool need = x < 65536;
    if (SAFE && need && w == s.end) return false;
    const uint32_t wide = x << 16 | *w;
    state = need ? wide : x; w += need;
    int q = int8_t(e);
    if (q == -128) { if (s.escape == s.last) return false; q = *s.escape++; }
    put(i, q);
  }
  s.word = w;
  return true;
}
template<class F> bool decode_rows(Stream s, const int16_t* rows, int64_t out, const int16_t* columns, int64_t in, F put) {
  for (int64_t o = 0; o < out; o++) {
    auto one = [&](int64_t i, int q) { put(o, i, q); };
    if (!(s.end - s.word > in ? decode_row<false>(s, o*in, rows[o], columns, in, one) : decode_row<true>(s, o*in, rows[o], columns, in, one))) return false;
  }
  for (int64_t l = 0; l < s.lanes; l++) if (s.state[l] != 65536) return false;
  return s.word == s.end && s.escape == s.last;
}
template<class T> auto scaled(T* y, const float* steps, const int16_t* rows, const int16_t* columns, int64_t in) {
  return [=](int64_t o, int64_t i, int q) { put(y + o*in + i, q*steps[rows[o] + columns[i]]); };
}
// a row of `tables` is zero, reach, law, escapes, as class Table of rate_distortion.py has them; `laws` has `span` shares for each law
vector<uint32_t> slots(const int32_t* tables, int64_t n, const int64_t* laws, int64_t span) {
  vector<uint32_t> out(n << 12);
  for (int64_t t = 0; t < n; t++, tables += 4) {
    const int64_t zero = tables[0], reach = tables[1], escapes = tables[3], *w = laws + tables[2]*span;
    const int64_t half = max(reach, (4096 - zero - escapes)/2);
    int64_t sum = 0, left = half;
    for (int64_t k = 0; k < reach; k++) sum += w[k];
    const auto share = [&](int64_t k) { return 1 + w[k]*(half - reach)/max(int64_t(1), sum); };
    for (int64_t k = 0; k < reach; k++) left -= share(k);
    uint32_t* at = out.data() + (t << 12);
    const auto put = [&](int q, int64_t f) { for (int64_t i = 0; i < f; i++) *at++ = uint32_t(uint8_t(q)) | uint32_t(f - 1) << 8 | uint32_t(i) << 20; };
    put(0, 4096 - 2*half - escapes);
    for (int64_t k = 0; k < reach; k++) { const int64_t f = share(k) + (k ? 0 : left); put(int(k) + 1, f); put(-int(k) - 1, f); }
    put(-128, escapes);
  }
  return out;
}
} // namespace

// codes as int16 (type -1), or times their steps, which `steps` holds for every sum of exponents from 0; returns 1 if the code does not end where it should
extern "C" int fips_decode(const uint16_t* words, int64_t n_words, uint32_t* states, int64_t lanes,
                           const int32_t* tables, int low, int high, const int64_t* laws, int64_t span, const int16_t* escapes, int64_t n_escapes, const int16_t* rows, int64_t out, const int16_t* columns, int64_t in,
                           const float* steps, int type, void* y) {
  const vector<uint32_t> table = slots(tables, high - low + 1, laws, span);
  const Stream s{words, words + n_words, states, lanes, table.data(), low, high, escapes, escapes + n_escapes};
  if (type < 0) return !decode_rows(s, rows, out, columns, in, [=](int64_t o, int64_t i, int q) { ((int16_t*)y)[o*in + i] = int16_t(q); });
  if (type == 0) return !decode_rows(s, rows, out, columns, in, scaled((float*)y, steps, rows, columns, in));
  if (type == 1) return !decode_rows(s, rows, out, columns, in, scaled((f16*)y, steps, rows, columns, in));
  return !decode_rows(s, rows, out, columns, in, scaled((bf16*)y, steps, rows, columns, in));
}

// The other way, from the last symbol to the first: symbols + 128 have frequencies and starts by class; words are written before `end`, and their number is returned
extern "C" int64_t fips_encode(const int16_t* symbols, const uint8_t* number, int64_t n, const uint64_t* freq, const uint64_t* start,
                               uint32_t* states, int64_t lanes, uint16_t* end) {
  uint16_t* w = end;
  for (int64_t p = n - 1; p >= 0; p--) {
    const int at = number[p]*256 + symbols[p] + 128;
    uint32_t& state = states[p & (lanes - 1)]; uint32_t x = state;
    const uint32_t f = uint32_t(freq[at]);
    if (x >= uint64_t(f) << 20) { *--w = uint16_t(x); x >>= 16; }
    state = (x/f << 12) + x % f + uint32_t(start[at]);
  }
  return end - w;
}
