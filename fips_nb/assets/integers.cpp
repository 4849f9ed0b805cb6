
// Inputs as integers of 8 bits, and sums of their products as floats, for fips_nb/coded_memory.py; compiled behind kernels.cpp. The product is PyTorch's.
// q (n x in) = round(x c / s) with s (n) = max |x c| / 127; a row with an infinite input or NaN gets such an s, so that all its outputs are NaN
extern "C" void fips_to_int8(const float* x, const float* c, int64_t n, int64_t in, int8_t* q, float* s, int threads) {
  parallel(n, threads, [=](int64_t i) {
    const float* xi = x + i*in; int8_t* qi = q + i*in;
    uint32_t top = 0;
    for (int64_t z = 0; z < in; z++) { const float f = xi[z]*c[z]; uint32_t u; memcpy(&u, &f, 4); top = max(top, u & 0x7fffffff); } // NaN is above all
    float most; memcpy(&most, &top, 4);
    const float inverse = top > 0x00800000 && top < 0x7f800000 ? 127.f/most : 0.f;
    for (int64_t z = 0; z < in; z++) { const float f = xi[z]*c[z]*inverse + 12582912.f; int32_t u; memcpy(&u, &f, 4); qi[z] = int8_t(u - 0x4b400000); } // 1.5*2^23: to nearest
    s[i] = most/127.f;
  });
}
// y (n x out) = sums*s*r + b
extern "C" void fips_from_int32(const int32_t* sums, const float* s, const float* r, const float* b, int64_t n, int64_t out, float* y, int threads) {
  parallel(n, threads, [=](int64_t i) {
    const int32_t* a = sums + i*out; float* yi = y + i*out; const float si = s[i];
    if (b) for (int64_t o = 0; o < out; o++) yi[o] = float(a[o])*si*r[o] + b[o];
    else for (int64_t o = 0; o < out; o++) yi[o] = float(a[o])*si*r[o];
  });
}
