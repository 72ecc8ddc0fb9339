#!/usr/bin/env bash
# The prefill and decode steps of small models under compute-sanitizer: memcheck, initcheck and racecheck, a line
# each. Exits with 1 if one of them finds something or does not come to its end; the logs are kept then. Needs a GPU
# and CUDA's compute-sanitizer.
#
#   scripts/sanitize.sh [MODEL ...]      folders with a golden.safetensors; by default some of tests/fixtures/golden
#   TOOLS="memcheck racecheck"           only these
#   LIMIT=300                            seconds of one run
#   LATHE=path SANITIZER=path            the programs; by default target/release/lathe and the one that is found
#
# racecheck keeps every access to shared memory, and the GEMV has most: with it among the others a run took more than
# 120 GB of the host. So all kernels but the GEMV are one run, and some steps with the GEMV and decode attention alone
# another. Decode attention is in both, as its clusters make the tool itself fail where it leaves them out (CUDA 13.0).
set -uo pipefail
cd "$(dirname "$0")/.."

lathe=${LATHE:-${CARGO_TARGET_DIR:-target}/release/lathe}
sanitizer=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
limit=${LIMIT:-300}
if [ ! -x "$lathe" ] || [ ! -x "$sanitizer" ]; then
    echo "error: $lathe or $sanitizer is missing; set LATHE and SANITIZER" >&2
    exit 2
fi
models=("$@")
if [ ${#models[@]} -eq 0 ]; then
    for name in llama-rope3-tied qwen3 gemma2; do
        models+=("tests/fixtures/golden/$name")
    done
fi
logs=$(mktemp -d)

# A prompt and two steps with one row.
echo '{"task_id": 0, "input_ids": [3, 1, 4], "output_tokens": 3}' >"$logs/three.jsonl"
echo '{skip_loading_weights: true, compile_backend: torch-compile, max_batch_size: 1}' >"$logs/few.yaml"

run() { # model, dtype, part, what to run it under
    local command=(verify)
    [ "$3" != gemv ] || command=(throughput --dataset "$logs/three.jsonl" --config "$logs/few.yaml" --warmup 0)
    "${@:4}" "$lathe" --model "$1" --device cuda --dtype "$2" --workspace "$logs" "${command[@]}"
}

# Once without: the kernels are compiled, and a model that fails by itself is no finding.
for model in "${models[@]}"; do
    for dtype in bfloat16 float32; do
        for part in all gemv; do
            if ! run "$model" "$dtype" "$part" >"$logs/plain.log" 2>&1; then
                cat "$logs/plain.log" >&2
                echo "error: $model fails in $dtype without the sanitizer" >&2
                exit 2
            fi
        done
    done
done

status=0
for tool in ${TOOLS:-memcheck initcheck racecheck}; do
    parts=all
    [ "$tool" != racecheck ] || parts="others gemv"
    runs=0 found="" unfinished=""
    for model in "${models[@]}"; do
        for dtype in bfloat16 float32; do
            for part in $parts; do
                name=$(basename "$model")-$dtype-$part
                only=()
                case $part in
                others) only=(--kernel-name-exclude kernel_substring=gemv) ;;
                gemv) only=(--kernel-name kernel_substring=gemv --kernel-name kernel_substring=attn_decode) ;;
                esac
                run "$model" "$dtype" "$part" timeout "$limit" "$sanitizer" --tool "$tool" "${only[@]}" \
                    --error-exitcode 86 >"$logs/$tool-$name.log" 2>&1
                code=$?
                runs=$((runs + 1))
                # The tool's own failures count as hazards in its summary.
                if grep -q 'Internal Sanitizer Error' "$logs/$tool-$name.log"; then
                    unfinished="$unfinished $name"
                elif [ "$code" -eq 86 ] || grep -q 'ERROR SUMMARY: [1-9]\|[1-9][0-9]* hazard' "$logs/$tool-$name.log"; then
                    found="$found $name"
                elif [ "$code" -ne 0 ]; then
                    unfinished="$unfinished $name"
                fi
            done
        done
    done
    if [ -z "$found$unfinished" ]; then
        printf '%-10s ok, %d runs\n' "$tool" "$runs"
        continue
    fi
    status=1
    printf '%-10s FAILED:%s' "$tool" "${found:- nothing found}"
    [ -z "$unfinished" ] || printf '; not finished:%s' "$unfinished"
    printf ' (%d runs, logs in %s)\n' "$runs" "$logs"
done
[ "$status" -ne 0 ] || rm -rf "$logs"
exit "$status"
