#!/usr/bin/env bash
# What a GPU is worth ten minutes for, the most valuable first. Results come as they are made, into
# $OUT, else benchmarks/results: each part has its own time limit and leaves a record and a log.
# An H100 or H200 with 16 host threads took 30 s for check, 91 for headline, 10 for kernels, 18 for
# microbenchmarks, 41 for tests, 30 for training without --compile, 97 for suite, 86 for 329
# candidates of tiles.
#   benchmarks/gpu_session.sh                     the first parts
#   benchmarks/gpu_session.sh check headline      these parts: check headline kernels tests training
#                                                 compiled microbenchmarks large suite tiles
#                                                 operators model jobs scaling
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out=${OUT:-$PWD/benchmarks/results}
mkdir -p "$out"
log="$out/session.log"
python=${PYTHON:-python3}
options=(-o 'testpaths=tests benchmarks' -o 'python_files=test_*.py bench_*.py' -p no:cacheprovider)
benchmark=("$python" -m pytest -q --benchmark "${options[@]}" --benchmark-columns=median,min,rounds)
failed=0
# Processes that compile; each holds a context of the GPU.
workers=$(($(nproc) < 14 ? $(nproc) : 14))

part() { # name, seconds, command…
  local name=$1 seconds=$2 start=$SECONDS code
  shift 2
  echo "=== $name ($seconds s): $*" | tee -a "$log"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed=1
  echo "=== $name: exit $code after $((SECONDS - start)) s" | tee -a "$log"
}

run() {
  case $1 in
    check) part check 70 "$python" -m benchmarks.check --seconds 60 --record "$out/gpu-check.json" ;;
    headline)
      part headline 150 "${benchmark[@]}" benchmarks/bench_operators.py --benchmark-headline \
        --benchmark-record "$out/gpu-headline.json"
      ;;
    kernels) part kernels 60 "$python" -m benchmarks.kernels --record "$out/gpu-kernels.json" ;;
    microbenchmarks)
      part microbenchmarks 70 "$python" -m benchmarks.microbenchmarks \
        --record "$out/gpu-microbenchmarks.json"
      ;;
    tests) # most of it is compilation, so each core takes its share of the tests
      part tests 120 "$python" -m pytest -q -x -n "$workers" --dist worksteal tests/kernels \
        -p no:cacheprovider
      ;;
    training)
      part training 60 "$python" -m benchmarks.throughput --batch 64 --batch 4 \
        --record "$out/gpu-training.json"
      ;;
    compiled)
      part compiled 180 "$python" -m benchmarks.throughput --batch 64 --batch 4 --compile \
        --record "$out/gpu-training-compiled.json"
      ;;
    large) # 1024 x 1024 pixels: time and peak memory
      part large 120 "$python" -m benchmarks.throughput --image-size 1024 --batch 1 --batch 4 \
        --steps 3 --record "$out/gpu-training-1024.json"
      part lean 120 "$python" -m benchmarks.throughput --image-size 1024 --batch 4 --steps 3 \
        --grad-checkpointing --record "$out/gpu-training-1024-lean.json"
      ;;
    suite)
      part suite 400 "$python" -m pytest -q -n "$workers" --dist worksteal tests \
        --ignore tests/ptx -p no:cacheprovider
      ;;
    tiles)
      part tiles 300 "$python" -m benchmarks.tiles --seconds 280 --record "$out/gpu-tiles.json"
      ;;
    operators)
      part operators 590 "${benchmark[@]}" benchmarks/bench_operators.py \
        --benchmark-record "$out/gpu-operators.json"
      ;;
    model)
      part model 300 "${benchmark[@]}" benchmarks/bench_model.py benchmarks/bench_distance.py \
        --benchmark-record "$out/gpu-model.json"
      ;;
    jobs)
      part jobs 300 "${benchmark[@]}" benchmarks/bench_jobs.py \
        --benchmark-record "$out/gpu-jobs.json"
      ;;
    scaling)
      part scaling 280 "${benchmark[@]}" benchmarks/bench_scaling.py \
        --benchmark-record "$out/gpu-scaling.json"
      ;;
    *) echo "there is no part $1" >&2; exit 2 ;;
  esac
}

: >"$log"
if [ $# -eq 0 ]; then set -- check headline kernels tests training compiled; fi
for name in "$@"; do run "$name"; done
exit "$failed"
