#!/usr/bin/env python3
"""Runs one workload under the four values of compile_backend and prints them side by side.

    python3 scripts/backends.py --lathe target/release/lathe --model FOLDER [--dtype bfloat16] [--requests 3]
        [--isl 128] [--osl 128]

FOLDER needs a config.json only: the weights are random, the same for every backend. One request at a time runs, so
that a step is a decode step of batch 1. Columns: time per output token, kernels and graphs launched a decode step,
kernels a layer, host time of submitting a step, and the greedy tokens compared with torch-simple's. In float32 they
should be equal; in bfloat16 two logits of random weights may be nearer to each other than the rounding of fused and
unfused kernels, and the sequences part there. Needs nothing but Python's standard library.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

BACKENDS = ["torch-simple", "torch-cudagraph", "torch-compile", "torch-opt"]


def run(arguments, backend, dataset, folder):
    config = folder / f"{backend}.yaml"
    config.write_text(
        f"compile_backend: {backend}\nskip_loading_weights: true\nmax_batch_size: 1\n"
        "transforms: {extract: {decode_batch: 1}}\n" + arguments.yaml.replace(";", "\n") + "\n"
    )
    report, requests = folder / f"{backend}.json", folder / f"{backend}.tokens.json"
    command = [
        arguments.lathe, "--model", arguments.model, "--dtype", arguments.dtype, "--device", arguments.device,
        "throughput", "--dataset", str(dataset), "--concurrency", "1", "--streaming", "--warmup", "1",
        "--config", str(config), "--report_json", str(report), "--output_json", str(requests),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"backends.py: {backend}: {done.stderr.strip()}")
    return json.loads(report.read_text()), json.loads(requests.read_text())


def compared(tokens, reference):
    """Where the outputs part from the reference's first."""
    parts = []
    for request, expected in reference.items():
        found = tokens[request]
        if found != expected:
            pairs = enumerate(zip(found, expected))
            at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
            parts.append((at, request))
    if not parts:
        return "equal"
    at, request = min(parts)
    return f"{len(parts)} of {len(reference)} requests part, the first (request {request}) at token {at}"


def main():
    parser = argparse.ArgumentParser(description="The four compile backends side by side")
    parser.add_argument("--lathe", default="target/release/lathe", help="the program")
    parser.add_argument("--model", required=True, help="folder with a config.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--isl", type=int, default=128, help="prompt tokens")
    parser.add_argument("--osl", type=int, default=128, help="output tokens")
    parser.add_argument("--yaml", default="", help="more settings, separated by ;")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        dataset = folder / "dataset.jsonl"
        lines = (
            {
                "task_id": i,
                "input_ids": [(i * 7919 + j * 37 + 11) % 200 for j in range(arguments.isl)],
                "output_tokens": arguments.osl,
            }
            for i in range(arguments.requests)
        )
        dataset.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{arguments.model}, {arguments.dtype}, {arguments.isl}/{arguments.osl}, batch 1")
        print(f"{'backend':<17} {'TPOT ms':>9} {'kernels':>8} {'a layer':>8} {'graphs':>7} {'host us':>8}  tokens")
        reference = None
        for backend in BACKENDS:
            report, tokens = run(arguments, backend, dataset, folder)
            reference = reference or tokens
            step = report["lathe"].get("execution") or {}
            tpot = report["streaming_metrics"]["tpot_percentiles"]["p50"]
            columns = [
                f"{backend:<17} {tpot:>9.4f}",
                f"{step.get('launches_per_decode_step', '-'):>8}",
                f"{step.get('kernels_per_layer', '-'):>8}",
                f"{step.get('graph_launches_per_decode_step', '-'):>7}",
                f"{step['submit_us']:>8.1f}" if step else f"{'-':>8}",
                f" {compared(tokens, reference)}",
            ]
            print(" ".join(columns), flush=True)


if __name__ == "__main__":
    main()
