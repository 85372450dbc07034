#!/usr/bin/env bash
# musl.sh COUNT SEED: whether musl has glibc's float32 powers (powers.c).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

command -v musl-gcc > /dev/null || { echo "needs musl-gcc (Debian: musl-tools)"; exit 1; }
mkdir -p build/powers
cc -O2 tests/fuzz/powers.c -o build/powers/glibc -lm
musl-gcc -O2 -static tests/fuzz/powers.c -o build/powers/musl -lm
for library in glibc musl; do "build/powers/$library" "$1" "$2" > "build/powers/$library.txt"; done
cat build/powers/glibc.txt
diff build/powers/glibc.txt build/powers/musl.txt
echo "musl: $((13 * $1)) powers, 0 differ, seed $2"
