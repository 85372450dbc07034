/* SPDX-License-Identifier: Apache-2.0 */
/* Float32 powers of a C library: TensorFlow takes them of the betas in every step, so all libraries must have the same.

   powers COUNT SEED prints digests of powf(beta, step): steps 1 to COUNT of the betas that are used, then COUNT random
   betas and steps. tests/fuzz/musl.sh compares what programs of glibc and of musl print. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t mixed(uint64_t digest, float power) {
  uint32_t bits;
  memcpy(&bits, &power, sizeof bits);
  return (digest ^ bits) * 0x100000001b3u;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const long count = atol(argv[1]);
  uint64_t random = (uint64_t)atol(argv[2]) * 2 + 1;
  const float betas[] = {0.5f, 0.8f, 0.9f, 0.95f, 0.98f, 0.99f, 0.995f, 0.997f, 0.999f, 0.9995f, 0.9999f, 0.99999f};
  for (size_t i = 0; i < sizeof betas / sizeof *betas; ++i) {
    uint64_t digest = 0xcbf29ce484222325u;
    for (long step = 1; step <= count; ++step) digest = mixed(digest, powf(betas[i], (float)step));
    printf("powf(%.9g, 1 to %ld) %016" PRIx64 "\n", (double)betas[i], count, digest);
  }
  uint64_t digest = 0xcbf29ce484222325u;
  for (long k = 0; k < count; ++k) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    const float beta = (float)(random >> 40) / 16777216.0f;             /* 24 bits: in [0, 1) */
    const float step = (float)(((random >> 8) & 0xffffff) >> (k % 24)); /* small ones as often as large ones */
    digest = mixed(digest, powf(beta, step));
  }
  printf("powf of %ld random numbers %016" PRIx64 "\n", count, digest);
  return 0;
}
