#!/usr/bin/env bash
# Searches the calls of c_calls.cpp by coverage, with AddressSanitizer: libfuzzer.sh [SECONDS] [SEED]. Needs clang++ with
# libFuzzer (Debian: clang and libclang-rt-dev). A finding is kept in build/libfuzzer/crash-*; give that file to
# build/libfuzzer/c_calls to repeat it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
seconds=${1:-60} seed=${2:-$RANDOM}
build=$root/build/libfuzzer
mkdir -p "$build"
probe='#include <cstdint>
#include <cstddef>
extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }'
if ! clang++ -x c++ -fsanitize=fuzzer,address -o "$build/probe" - <<< "$probe" 2> "$build/probe.log"; then
  echo "skipped: no clang++ with libFuzzer ($(tail -n 1 "$build/probe.log"))"
  exit 0
fi
CXX=clang++ cmake -S "$root" -B "$build" -G Ninja -DFASTADAM_PYTHON=OFF -DFASTADAM_ISAS="${ISAS:-AUTO}" \
  -DSKBUILD_PROJECT_VERSION=0 "-DCMAKE_CXX_FLAGS=-fsanitize=fuzzer-no-link,address -g1" > "$build/cmake.log"
cmake --build "$build" --target fastadam > "$build/build.log" || { cat "$build/build.log"; exit 1; }
clang++ -std=c++17 -O1 -g1 -fsanitize=fuzzer,address -DFASTADAM_LIBFUZZER "$root/tests/fuzz/c_calls.cpp" \
  -I "$root/csrc/include" -L "$build" -lfastadam -Wl,-rpath,"$build" -o "$build/c_calls"
mkdir -p "$build/corpus"
cd "$build"
OMP_NUM_THREADS=1 ./c_calls corpus -seed="$seed" -max_total_time="$seconds" -max_len=2048 -print_final_stats=1 2> log ||
  { tail -n 60 log; echo "libfuzzer: seed $seed: a finding"; exit 1; }
runs=$(sed -n 's/^stat::number_of_executed_units: *//p' log)
covered=$(sed -n 's/.*cov: \([0-9]*\).*/\1/p' log | tail -n 1)
echo "libfuzzer: seed $seed: $runs calls, $covered edges covered, 0 findings"
