#!/usr/bin/env bash
# The prefill and decode steps of small models under compute-sanitizer: memcheck, racecheck and initcheck, a line
# each. Exits with 1 if one of them finds something. Needs a GPU and CUDA's compute-sanitizer; the log of a tool
# that found something stays in the folder that its line names.
#
#   scripts/sanitize.sh [MODEL ...]      folders with a golden.safetensors; by default some of tests/fixtures/golden
#   LATHE=path SANITIZER=path            the programs; by default target/release/lathe and the one that is found
set -uo pipefail
cd "$(dirname "$0")/.."

lathe=${LATHE:-${CARGO_TARGET_DIR:-target}/release/lathe}
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
if [ ! -x "$lathe" ] || [ ! -x "$sanitizer" ]; then
    echo "error: $lathe or $sanitizer is missing; set LATHE and SANITIZER" >&2
    exit 2
fi
models=("$@")
if [ ${#models[@]} -eq 0 ]; then
    for name in llama-rope3-tied qwen3 mistral-window; do
        models+=("tests/fixtures/golden/$name")
    done
fi
logs=$(mktemp -d)

verify() { # model, dtype
    "${@:3}" "$lathe" --model "$1" --device cuda --dtype "$2" --workspace "$logs" verify
}

# Once without: the kernels are compiled, and a model that fails by itself is no finding.
for model in "${models[@]}"; do
    for dtype in bfloat16 float32; do
        if ! verify "$model" "$dtype" >"$logs/verify.log" 2>&1; then
            cat "$logs/verify.log" >&2
            echo "error: $model fails in $dtype without the sanitizer" >&2
            exit 2
        fi
    done
done

status=0
for tool in memcheck racecheck initcheck; do
    found=0
    for model in "${models[@]}"; do
        for dtype in bfloat16 float32; do
            log="$logs/$tool-$(basename "$model")-$dtype.log"
            if ! verify "$model" "$dtype" "$sanitizer" --tool "$tool" --error-exitcode 86 >"$log" 2>&1; then
                found=$((found + 1))
                status=1
            fi
        done
    done
    if [ "$found" -eq 0 ]; then
        printf '%-10s ok, %d runs\n' "$tool" $((2 * ${#models[@]}))
    else
        printf '%-10s FAILED in %d of %d runs: %s\n' "$tool" "$found" $((2 * ${#models[@]})) "$logs"
        grep -h -m 3 '=========' "$logs/$tool"-*.log | sed 's/^/    /' >&2
    fi
done
[ "$status" -ne 0 ] || rm -rf "$logs"
exit "$status"
