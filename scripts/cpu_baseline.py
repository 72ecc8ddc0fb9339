#!/usr/bin/env python3
"""Times transformers on this machine's CPU, as the other side of lathe's CPU numbers.

    python3 scripts/cpu_baseline.py --model FOLDER [--threads N] [--dtype bfloat16] [--repeats 5]

Needs torch and transformers. Measures the decode step at batch 1 and 8 and a prefill, each with static
token ids and logits of the last row only; every number is the median of the repeats. Prints JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time

try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
except ImportError as error:
    sys.exit(f"cpu_baseline.py: {error}; pip install torch transformers")


def token_ids(batch, length, vocab_size):
    """Fixed ids, the same in every run: a multiplicative sequence over the vocabulary."""
    index = torch.arange(batch * length, dtype=torch.int64).reshape(batch, length)
    return (index * 7919 + 17) % vocab_size


def time_prefill(model, batch, length):
    ids = token_ids(batch, length, model.config.vocab_size)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def time_decode(model, batch, prompt, steps):
    """Seconds of one decode step, the mean over `steps` steps after a prompt."""
    ids = token_ids(batch, prompt + steps, model.config.vocab_size)
    cache = model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    start = time.perf_counter()
    for step in range(prompt, prompt + steps):
        output = model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return (time.perf_counter() - start) / steps


def median(repeats, measure):
    measure()
    return statistics.median(measure() for _ in range(repeats))


def main():
    parser = argparse.ArgumentParser(description="Time transformers on the CPU")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens before decoding, and of the prefill")
    parser.add_argument("--steps", type=int, default=32, help="decode steps a repeat")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    result = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "repeats": arguments.repeats,
    }
    for batch in (1, 8):
        seconds = median(arguments.repeats, lambda: time_decode(model, batch, arguments.prompt, arguments.steps))
        result[f"decode_batch_{batch}_ms"] = round(seconds * 1e3, 4)
        result[f"decode_batch_{batch}_tok_s"] = round(batch / seconds, 3)
    seconds = median(arguments.repeats, lambda: time_prefill(model, 1, arguments.prompt))
    result[f"prefill_{arguments.prompt}_ms"] = round(seconds * 1e3, 4)
    result[f"prefill_{arguments.prompt}_tok_s"] = round(arguments.prompt / seconds, 3)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
