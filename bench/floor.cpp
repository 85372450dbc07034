// SPDX-License-Identifier: Apache-2.0
// The traffic floor: 4 reads and 3 writes of float32 per element with next to no arithmetic. No Adam can be faster in
// memory than this loop; built and loaded by bench/common.py.
#include <cstdint>

extern "C" void traffic_floor(float* p, const float* g, float* m, float* v, int64_t n) {
// Every load before every store: a load that follows a store to the same offset in another page waits for it.
#pragma omp parallel for simd schedule(static) if (n >= 32768)
  for (int64_t i = 0; i < n; ++i) {
    const float gradient = g[i];
    const float new_m = m[i] + gradient;
    const float new_v = v[i] - gradient;
    const float new_p = p[i] + gradient;
    m[i] = new_m;
    v[i] = new_v;
    p[i] = new_p;
  }
}

// The same for a pass over a table of which next to no row has a gradient: 3 reads and 3 writes.
extern "C" void table_floor(float* p, float* m, float* v, int64_t n) {
#pragma omp parallel for simd schedule(static) if (n >= 32768)
  for (int64_t i = 0; i < n; ++i) {
    const float new_m = m[i] + 1.0f;
    const float new_v = v[i] - 1.0f;
    const float new_p = p[i] + 1.0f;
    m[i] = new_m;
    v[i] = new_v;
    p[i] = new_p;
  }
}
