// SPDX-License-Identifier: Apache-2.0
// Run by isas.cmake: prints the widest instruction set that this CPU supports.
#include <cstdio>

#include "cpu_features.h"

int main() { std::puts(fastadam::cpu::has_avx512() ? "avx512" : fastadam::cpu::has_avx2() ? "avx2" : "baseline"); }
