#!/usr/bin/env python3
"""Compares the programs of two builds of lathe: kernels in order, launches and CUDA text of every bucket.

    python3 scripts/same_programs.py [options] OLD NEW [FOLDER...]

OLD, NEW      binaries
FOLDER        a model, or a folder of models; without any, all of tests/fixtures
--ir          compares the dumps of the IR after every stage, too
--layers N    compiles the first N layers of each model (default 6), --layers 0 all
--only WORD   models whose path has WORD in it
--jobs N      comparisons at a time (default 1)

Every model is compiled fused and unfused, in bf16 and f32. A model that both refuse counts as compared if both
say the same. Kernels are compared with their comments. Fails at the first model that differs, with a diff of the file
that does. Needs Python's standard library, and no GPU.
"""

import argparse
import difflib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = [ROOT / "tests/fixtures/golden", ROOT / "tests/fixtures/configs"]
# Backends with other kernels; each of the other two differs from one of these in whether it captures graphs.
BACKENDS = ["torch-opt", "torch-simple"]
DTYPES = ["bfloat16", "float32"]
# What families call the number of layers.
LAYERS = ["num_hidden_layers", "n_layer"]
DIFF_LINES = 60


def models(folders):
    """The folders with a config.json, in order."""
    for folder in folders:
        if (folder / "config.json").exists():
            yield folder
        else:
            yield from sorted(p.parent for p in folder.glob("*/config.json"))


def dump(binary, model, backend, dtype, kwargs, ir, out):
    """Compiles a model into a folder; returns what is on stderr if it is refused."""
    options = out / "options.yaml"
    options.write_text(json.dumps({"compile_backend": backend} | ({"model_kwargs": kwargs} if kwargs else {})))
    # The CPU needs no driver; the target says for which device.
    command = [binary, "--device", "cpu", "--log_level", "error", "--dtype", dtype, "--model", model, "compile"]
    command += ["--target", "h100", "--config", options, "--dump-dir"]
    said = []
    for extra in [["--emit", "cuda-buckets"]] + ([["--dump-ir", "after-all"]] if ir else []):
        part = out / extra[0].strip("-")
        run = subprocess.run([str(c) for c in command + [part] + extra], capture_output=True, text=True)
        if run.returncode:
            said.append(run.stderr.strip())
    options.unlink()
    return "\n".join(said)


def files(folder):
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def content(path):
    """What is compared of a file: all but how long a stage took."""
    return "".join(line for line in path.read_text().splitlines(True) if not line.startswith("// time: "))


def compare(old, new):
    """The difference of two folders, or nothing."""
    a, b = files(old), files(new)
    out = [f"only the old build writes {n}" for n in a if n not in b]
    out += [f"only the new build writes {n}" for n in b if n not in a]
    for name in a:
        if name in b and content(a[name]) != content(b[name]):
            lines = [content(p).splitlines() for p in (a[name], b[name])]
            # Files of ten thousands of lines: the first that differs with its neighbours, not a whole diff.
            first = next((i for i, (x, y) in enumerate(zip(*lines)) if x != y), min(map(len, lines)))
            near = [part[max(first - 3, 0) : first + DIFF_LINES] for part in lines]
            out += [f"{name} differs from line {first + 1}"]
            out += list(difflib.unified_diff(*near, "old", "new", lineterm="", n=2))[:DIFF_LINES]
            break
    return "\n".join(out)


def check(args, model, backend, dtype):
    case = f"{model} {backend} {dtype}"
    config = json.loads((model / "config.json").read_text())
    count = next((k for k in LAYERS if isinstance(config.get(k), int)), None)
    kwargs = {count: args.layers} if args.layers and count and config[count] > args.layers else {}
    with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as new:
        sides = [(args.old, Path(old)), (args.new, Path(new))]
        said = [dump(binary, model, backend, dtype, kwargs, args.ir, out) for binary, out in sides]
        if said[0] != said[1]:
            return case, f"old: {said[0] or 'compiles'}\nnew: {said[1] or 'compiles'}", 0
        return case, compare(Path(old), Path(new)), len(files(Path(old)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("folders", type=Path, nargs="*", default=DEFAULT)
    parser.add_argument("--ir", action="store_true")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_intermixed_args()
    args.old, args.new = args.old.resolve(), args.new.resolve()
    cases = [(m, b, d) for m in models(args.folders) if args.only in str(m) for b in BACKENDS for d in DTYPES]
    if not cases:
        sys.exit("no model has a config.json here")
    compared = refused = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for case, difference, count in pool.map(lambda c: check(args, *c), cases):
            if difference:
                print(f"{case}\n{difference}", flush=True)
                # Comparisons that have not begun are of no interest any more.
                os._exit(1)
            refused += count == 0
            compared += count
    print(f"{len(cases)} compilations are the same: {compared} files, {refused} compilations are refused alike")


if __name__ == "__main__":
    main()
