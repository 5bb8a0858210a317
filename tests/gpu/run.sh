#!/usr/bin/env bash
# Tests and bench on a machine with a GPU, where there may be no Rust, no make and no network.
#
#     tests/gpu/run.sh test | bench | sanitize ...
#
# Where qkern is not built, its compiled part comes from the wheels of build/gpu (`make gpu-bundle`),
# and so does what else lies there; the Python files are those of this tree.
#
#     GPU_PYTHON    the interpreter that has torch, triton and pytest; python3 by default
#     OUT           where results go; build/gpu-results by default
#     LIMIT         seconds for each part; 540 by default
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
cache=${TRITON_CACHE_DIR:-$HOME/.triton/cache}
mkdir -p "$out" "$cache"
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$cache

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "build/gpu/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$site" build/gpu/*.whl || exit 1
fi
if ! compgen -G "python/qkern/_native*.so" >/dev/null; then
    cp "$site"/qkern/_native*.so python/qkern/ || {
        echo "error: qkern is not built: run 'make gpu-bundle' where there is Rust, and bring" \
            "build/gpu" >&2
        exit 1
    }
fi
export PYTHONPATH="$PWD/python:$site${PYTHONPATH:+:$PYTHONPATH}"
# Compiled kernels of an earlier run on the same kind of machine.
[ -f build/gpu/triton-cache.tgz ] && tar -xzf build/gpu/triton-cache.tgz -C "$cache"

has() { "$python" -c "import $1" 2>/dev/null; }

run_test() { # arguments are pytest's
    local parallel=()
    has xdist && [ "$workers" -gt 1 ] && parallel=(-n "$workers" --dist worksteal)
    # Another torch warns of other things: no errors here.
    QKERN_TEST_DEVICE=${QKERN_TEST_DEVICE:-cuda} timeout -k 10 "$limit" "$python" -m pytest \
        -q -W default -p no:cacheprovider --junitxml "$out/test-gpu.xml" --durations 15 \
        "${parallel[@]}" "$@" 2>&1 | tee "$out/test-gpu.log"
}

failed=0
for part in "$@"; do
    case $part in
    test) run_test tests/gpu tests/kernels ;;
    sanitize) run_test tests/gpu/test_sanitizer.py ;;
    bench)
        # shellcheck disable=SC2086 # several arguments in one variable
        timeout -k 10 $((limit + 30)) "$python" benches/bench_gpu.py --budget "$limit" \
            --out "$out/gpu.json" ${BENCH_ARGS:-} 2>&1 | tee "$out/bench-gpu.log"
        ;;
    esac || failed=1
done
tar -czf "$out/triton-cache.tgz" -C "$cache" . 2>/dev/null
exit $failed
