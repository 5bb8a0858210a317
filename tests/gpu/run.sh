#!/usr/bin/env bash
# Tests and bench on a machine with a GPU, where there may be no Rust, no make and no network.
#
#     tests/gpu/run.sh test | bench | sanitize ...
#
# Where qkern is not built, its compiled part comes from the wheels of build/gpu (`make gpu-bundle`),
# and so does what else lies there; the Python files are those of this tree. What an earlier run
# left, put into build/gpu, is not done again: triton-cache.tgz, and gpu.json for the bench.
#
#     GPU_PYTHON    the interpreter that has torch, triton and pytest; python3 by default
#     OUT           where results go; build/gpu-results by default
#     LIMIT         seconds for all parts, which share what is left; 540 by default
#     TEST_ARGS     what pytest runs for `test`; "tests/gpu tests/kernels" by default
#     TEST_TIMEOUT  seconds for a test; 150 by default
#     BENCH_ARGS    more of bench_gpu.py
#     WORKERS       processes of pytest, if pytest-xdist is there; a few less than cores by default
#     QKERN_COMMIT  what the bench says of the commit, where there is no git
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- test
for part in "$@"; do
    case $part in
    test | sanitize | bench) ;;
    *)
        echo "error: no part '$part': there are test, sanitize, bench" >&2
        exit 2
        ;;
    esac
done
python=${GPU_PYTHON:-python3}
out=${OUT:-build/gpu-results}
limit=${LIMIT:-540}
cores=$(nproc)
workers=${WORKERS:-$((cores > 12 ? 12 : cores > 3 ? cores - 2 : 1))}
cache=${TRITON_CACHE_DIR:-${HOME:-/tmp}/.triton/cache}
mkdir -p "$out" "$cache"
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$cache
# What is compiled is a third as large without the lines of its source.
export TRITON_DISABLE_LINE_INFO=${TRITON_DISABLE_LINE_INFO:-1}

site=$(mktemp -d)
copied=()
trap 'rm -rf "$site" "${copied[@]}"' EXIT
if compgen -G "build/gpu/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$site" build/gpu/*.whl || exit 1
fi
if ! compgen -G "python/qkern/_native*.so" >/dev/null; then
    for native in "$site"/qkern/_native*.so; do
        cp "$native" python/qkern/ || {
            echo "error: qkern is not built: run 'make gpu-bundle' where there is Rust, and bring" \
                "build/gpu" >&2
            exit 1
        }
        copied+=("python/qkern/${native##*/}") # the next run may bring another
    done
fi
export PYTHONPATH="$PWD/python:$PWD/tests:$site${PYTHONPATH:+:$PYTHONPATH}"
[ -f build/gpu/triton-cache.tgz ] && tar -xzf build/gpu/triton-cache.tgz -C "$cache"

has() { "$python" -c "import $1" 2>/dev/null; }

run_pytest() { # its seconds, the name of its results, its arguments
    local seconds=$1 name=$2 parallel=()
    shift 2
    # A process that hangs, or whose device is lost, ends; another takes its place.
    has xdist && [ "$workers" -gt 1 ] &&
        parallel=(-n "$workers" --dist worksteal --max-worker-restart 60 --timeout-method thread)
    # Interrupted, pytest still says what failed. Another torch warns of other things: no errors here.
    QKERN_TEST_DEVICE=${QKERN_TEST_DEVICE:-cuda} timeout -s INT -k 15 "$seconds" "$python" -m pytest \
        -q -W default -p no:cacheprovider -p gpu_outcomes --outcomes "$out/$name.jsonl" \
        --timeout "${TEST_TIMEOUT:-150}" --durations 15 "${parallel[@]}" "$@" 2>&1 |
        tee "$out/$name.log"
}

run_bench() { # its seconds
    local earlier=()
    [ -f build/gpu/gpu.json ] && earlier=(--resume build/gpu/gpu.json)
    # shellcheck disable=SC2086 # several arguments in one variable
    timeout -k 10 $(($1 + 20)) "$python" benches/bench_gpu.py --budget "$1" --out "$out/gpu.json" \
        "${earlier[@]}" ${BENCH_ARGS:-} 2>&1 | tee "$out/bench-gpu.log"
}

failed=0
parts=$#
for part in "$@"; do
    share=$(((limit - SECONDS) / parts))
    parts=$((parts - 1))
    case $part in
    test)
        # shellcheck disable=SC2086 # several arguments in one variable
        run_pytest "$share" test-gpu ${TEST_ARGS:-tests/gpu tests/kernels} \
            --ignore tests/gpu/test_sanitizer.py
        ;;
    sanitize) TRITON_DISABLE_LINE_INFO=0 run_pytest "$share" sanitize-gpu tests/gpu/test_sanitizer.py ;;
    bench) run_bench "$share" ;;
    esac || failed=1
done
# What Triton loads: the code in between is ten times as much.
tar -czf "$out/triton-cache.tgz" --exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' \
    --exclude='*.ptx' --exclude='*.source' -C "$cache" . 2>/dev/null
exit $failed
