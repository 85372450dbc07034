#!/usr/bin/env bash
# What whoever gets a GPU runs first; about ten minutes. It builds the CUDA code for this GPU, then goes from what is
# most likely to be wrong to what takes longest. A stage that fails does not stop those after it. The exit status is 0
# only if every stage ran and passed.
#
#     bash tests/first_gpu_run.sh [--no-build]      # in the environment of the tests, with CuPy and a CUDA build of torch
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # or JAX leaves CuPy and PyTorch no memory
export PIP_DISABLE_PIP_VERSION_CHECK=1
logs=$PWD/build/first_gpu_run
mkdir -p "$logs"
summary=()
failed=0

note() { # note TEXT: for the summary; whoever reads only that must see it
  summary+=("$1")
  failed=1
}
report() {
  printf '\n== first_gpu_run: %s s, logs in %s\n' "$SECONDS" "$logs"
  [[ ${#summary[@]} == 0 ]] || printf '%s\n' "${summary[@]}"
}
trap report EXIT

stage() { # stage NAME COMMAND...
  local name=$1 start=$SECONDS log
  log=$logs/${name//[^a-z0-9]/_}.log
  shift
  printf '\n== %s\n' "$name"
  if "$@" 2>&1 | tee "$log" | tail -n 25; then
    summary+=("passed:  $name, $((SECONDS - start)) s")
  else
    note "FAILED:  $name, $((SECONDS - start)) s: see $log"
  fi
  if grep -q '^SKIPPED' "$log"; then note "SKIPPED in $name: $(grep -h '^SKIPPED' "$log" | tr '\n' ';')"; fi
}
on_gpu() { python -m pytest -q -m gpu -rs "$@"; }
have() { command -v "$1" > /dev/null; }

if [[ ${1:-} != --no-build ]]; then
  have nvidia-smi && nvidia-smi -L || { note "not run: nvidia-smi finds no GPU"; exit 1; }
  have nvcc || { note "not run: nvcc, which compiles the CUDA code, is not installed"; exit 1; }
  CMAKE_ARGS="-DFASTADAM_CUDA=ON -DFASTADAM_CUDA_ARCHITECTURES=native" \
    stage "build for this GPU" pip install --no-deps --force-reinstall .
fi
python - << 'EOF' || { note "not run: fastadam sees no GPU; see above"; exit 1; }
import sys
from importlib.metadata import PackageNotFoundError, version

import fastadam

fastadam.show_config()
for package in ("cupy-cuda13x", "cupy-cuda12x", "torch", "jax"):
    try:
        print(package, version(package))
    except PackageNotFoundError:
        pass
sys.exit(not fastadam.cuda.is_available())
EOF
pinned=$(sed -n 's/.*"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)
torch=$(python -c 'import torch; print(torch.__version__.split("+")[0])' 2> /dev/null || echo none)
[[ $torch == "$pinned" ]] || note "torch is $torch, and the tests were written for $pinned: a difference may be torch's"

# Bits first: where a GPU and a CPU flush tiny numbers, then whole steps.
stage "numbers at the border of what is flushed" on_gpu tests/test_cuda_tiny.py
stage "dense steps" on_gpu tests/test_cuda.py tests/test_cuda_numbers.py
stage "rows, late errors, the C interface" on_gpu tests/test_cuda_rows.py tests/test_cuda_late_errors.py tests/test_cuda_c_interface.py
stage "streams and captures" on_gpu tests/test_cuda_order.py tests/test_cuda_graph.py tests/test_cuda_captures.py
# The first launch of a kernel inside a capture loads its code, which not every driver allows.
CUDA_MODULE_LOADING=LAZY stage "a graph in a fresh process, kernels loaded late" on_gpu tests/test_torch_cuda.py -k graph
stage "torch" on_gpu tests/test_torch_cuda.py tests/test_cuda_torch.py
stage "JAX" on_gpu tests/test_jax_cuda.py

# Memory and races.
if have compute-sanitizer; then
  check() { compute-sanitizer --error-exitcode 1 --tool "$1" python -m pytest -q -m gpu -rs "${@:2}"; }
  stage "memcheck" check memcheck tests/test_cuda_rows.py -k "any_width or accumulated"
  stage "racecheck" check racecheck tests/test_cuda.py -k "global_clipnorm and float32"
else
  note "not run: compute-sanitizer is not installed"
fi

# Speed. In ncu's output a DenseStep of float32 should move 28 bytes per element: more means that sectors are read in
# part. Compare its stalls on long scoreboards with the issue slots in use, and its occupancy with what registers allow.
stage "bench" python bench/on_gpu.py --turns 3
if have ncu; then
  stage "ncu" ncu --clock-control none --set full --kernel-name regex:run_phases --launch-skip 20 --launch-count 12 \
    python bench/on_gpu.py --turns 3
else
  note "not run: ncu is not installed"
fi
exit "$failed"
