#!/usr/bin/env bash
# What lathe does, shown with a real model on this machine's CPU. Everything lies in .demo afterwards;
# `make demo` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."

CARGO=${CARGO:-cargo}
PYTHON=${PYTHON:-python3}
TARGET=${TARGET:-${CARGO_TARGET_DIR:-target}}
REQUESTS=${REQUESTS:-8}
lathe=$TARGET/release/lathe

say() { printf '\n== %s\n' "$*" >&2; }

say "Model: SmolLM2-135M-Instruct, once"
model=$("$PYTHON" scripts/get_smollm2.py)

say "Build"
"$CARGO" build --release --quiet

say "A question, answered on the CPU"
"$lathe" --model "$model" --device cpu generate --max_tokens 48 --prompt "What is photosynthesis?"

say "A dataset of $REQUESTS requests, 128 tokens in and 128 out"
dataset=.demo/synthetic_128_128.jsonl
"$lathe" --model "$model" prepare-dataset --output "$dataset" token-norm-dist --num-requests "$REQUESTS" \
    --input-mean 128 --input-stdev 0 --output-mean 128 --output-stdev 0

say "Its throughput, one static batch"
config=.demo/demollm.yaml
echo "runtime: demollm" > "$config"
report=.demo/report.json
"$lathe" --model "$model" --device cpu throughput --dataset "$dataset" --extra_llm_api_options "$config" \
    --report_json "$report"

say "Where everything lies"
printf '%-10s %s\n' program "$lathe" model "$model" dataset "$dataset" config "$config" report "$report"
