#!/usr/bin/env python3
"""Measures the shape of the source.

    python3 scripts/shape.py [--circles] [--check]

--circles  also lists the files of every import circle and what ties them
--check    fails if a figure is above its limit

Counted are mentions of operations by name, operands that are read by number, files that import each other
in a circle, and lines. All but the lines are counted in production code: Rust under the `src` of a crate,
without comments, strings and tests. Needs nothing but git and Python's standard library.
"""

import argparse
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# Greatest value that --check accepts.
LIMITS = {"op": 499, "circles": 3, "long": 0}
LONGEST = 700

ROOT = Path(__file__).resolve().parent.parent
CRATES = {"lathe": "src"} | {c: f"{c}/src" for c in ("ir", "passes", "codegen", "runtime")}

# Comments and literals, in the order in which Rust reads them.
TOKENS = re.compile(
    r'//[^\n]*|/\*.*?\*/|b?r(#*)".*?"\1|b?"(?:\\.|[^"\\])*"|b?\'(?:\\[^\n]{1,9}?|[^\\\n])\'', re.S
)
TEST = re.compile(r"#\[cfg\((?:all\()?test\b[^\]]*\]")
TEST_MODULE = re.compile(r"#\[cfg\((?:all\()?test\b[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*(?:pub(?:\([^)]*\))? )?mod (\w+);")
INLINE_MODULE = re.compile(r"\bmod \w+ \{")
USE = re.compile(r"\b(?:pub(?:\([^)]*\))?\s+)?use\s+([^;]+);")
PATH = re.compile(r"(?<![\w:])(?:crate|super|self)(?:::\w+)+")
RELATIVE = re.compile(r"(?<![\w:.])([a-z]\w*)((?:::\w+)+)")
DEFINITION = re.compile(r"(?<!')\b(?:fn|struct|enum|union|trait|const|static|type|macro_rules!)\s+(?:mut\s+)?(\w+)")
OPERAND = re.compile(
    r"\b(?:tensor|optional|operand|input)\(\d+\)|\b(?:operands|inputs|args|types|tensors)(?:\(\))?\[\d+\]"
)


def blank(text):
    """The text with everything but line breaks replaced by spaces."""
    return re.sub(r"[^\n]", " ", text)


def without_tests(code):
    """The code without items that only tests have; literals and comments must be blank already."""
    while found := TEST.search(code):
        depth, end = 0, found.end()
        while end < len(code):
            c = code[end]
            depth += (c in "{([") - (c in "})]")
            end += 1
            if depth == 0 and c in ";}" or depth < 0:
                break
        code = code[: found.start()] + blank(code[found.start() : end]) + code[end:]
    return code


def flattened(code):
    """The code with paths of modules that stand within the file as paths of the file itself."""
    for found in reversed(list(INLINE_MODULE.finditer(code))):
        depth, end = 1, found.end()
        while end < len(code) and depth:
            depth += (code[end] == "{") - (code[end] == "}")
            end += 1
        inside = re.sub(r"(?<!::)\bsuper::", "self::", code[found.end() : end])
        code = code[: found.end()] + inside + code[end:]
    return code


def leaves(tree):
    """The paths of a use declaration as (path, name that it brings); the name `*` is a glob."""
    tree = tree.strip()
    if "{" not in tree:
        path, _, alias = (part.strip() for part in tree.partition(" as "))
        parts = [p.strip() for p in path.split("::") if p.strip()]
        name = alias or parts[-1]
        if parts[-1] == "self":
            parts, name = parts[:-1], alias or parts[-2]
        yield parts, name
        return
    head, _, rest = tree.partition("{")
    depth, start, inner = 0, 0, rest[: rest.rindex("}")]
    for i, c in enumerate(inner + ","):
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            if inner[start:i].strip():
                yield from leaves(head + inner[start:i].strip())
            start = i + 1


class Module:
    """One source file: what it defines and what it names."""

    def __init__(self, file, path):
        self.file, self.path = file, path
        self.raw = (ROOT / file).read_text()
        plain = TOKENS.sub(lambda m: blank(m[0]), self.raw)
        self.test_children = set(TEST_MODULE.findall(plain))
        self.code = flattened(without_tests(plain))
        self.defined = set(DEFINITION.findall(self.code))
        self.uses = [leaf for tree in USE.findall(self.code) for leaf in leaves(tree)]
        # Imports stand for themselves; other paths are found where they are written.
        rest = USE.sub(lambda m: blank(m[0]), self.code)
        self.paths = [m[0].split("::") for m in PATH.finditer(rest)]
        self.relative = [[m[1]] + m[2].split("::")[1:] for m in RELATIVE.finditer(rest)]


class Crate:
    """The modules of a crate and the arrows between their files."""

    def __init__(self, folder, files):
        self.modules = {}
        for file in files:
            parts = list(Path(file).relative_to(folder).with_suffix("").parts)
            if parts[-1] in ("mod", "lib", "main"):
                parts = parts[:-1]
            if tuple(parts) not in self.modules or file.endswith("lib.rs"):
                self.modules[tuple(parts)] = Module(file, tuple(parts))
        tests = {m.path + (c,) for m in self.modules.values() for c in m.test_children}
        is_test = lambda path: any(path[: i + 1] in tests for i in range(len(path)))
        self.modules = {p: m for p, m in self.modules.items() if not is_test(p)}

    def resolve(self, module, parts, seen=()):
        """The module that a path from `module` leads to; none if it leads out of the crate."""
        at = module.path
        if parts[0] == "crate":
            at, parts = (), parts[1:]
        while parts and parts[0] in ("self", "super"):
            at, parts = (at[:-1] if parts[0] == "super" else at), parts[1:]
        for i, part in enumerate(parts):
            here = self.modules.get(at)
            if at + (part,) in self.modules:
                at += (part,)
                continue
            if here is None:
                return None
            if part in here.defined or (here.path, part) in seen:
                return here
            seen += ((here.path, part),)
            for path, name in here.uses:
                if name == part and path != [part]:
                    return self.resolve(here, path, seen)
            for path, name in here.uses:
                if name == "*":
                    found = self.resolve(here, path[:-1], seen)
                    if found and found is not here and part in found.defined:
                        return found
            return here if i or module.path != at else None
        return self.modules.get(at)

    def arrows(self):
        """For each file, the files whose names it takes, with those names."""
        arrows = defaultdict(lambda: defaultdict(set))
        for module in self.modules.values():
            inside = [p for p, _ in module.uses if p[0] in ("crate", "self", "super")]
            children = {p[-1] for p in self.modules if p[:-1] == module.path and p}
            inside += [p for p, _ in module.uses if p[0] in children]
            inside += module.paths + [p for p in module.relative if p[0] in children]
            for parts in inside:
                target = self.resolve(module, parts[:-1] if parts[-1] == "*" else parts)
                # A folder's own file stands for the folder: that it names what lies inside ties no knot.
                if target and target.path[: len(module.path)] != module.path:
                    arrows[module.file][target.file].add(parts[-1])
        return arrows


def circles(arrows):
    """Strongly connected components of more than one file (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in sorted(arrows.get(v, ())):
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            at = stack.index(v)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for v in sorted(arrows):
        if v not in index:
            visit(v)
    return sorted(found)


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [f for f in listed.stdout.split() if (ROOT / f).exists()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--circles", action="store_true", help="list the import circles")
    parser.add_argument("--check", action="store_true", help="fail above the limits")
    args = parser.parse_args()

    op, op_files, operands, knots, production = 0, 0, 0, [], []
    for crate, folder in CRATES.items():
        files = [f for f in tracked(f"{folder}/*.rs") if "/tests/" not in f]
        tree = Crate(folder, files)
        arrows = tree.arrows()
        knots += [(c, arrows) for c in circles(arrows)]
        for module in tree.modules.values():
            production.append(module.raw.count("\n"))
            n = len(re.findall(r"\bOp::", module.code))
            op, op_files = op + n, op_files + (n > 0)
            if crate in ("passes", "codegen", "runtime"):
                operands += len(OPERAND.findall(module.code))
    lengths = {f: (ROOT / f).read_text().count("\n") for f in tracked("*.rs", "*.cu", "*.cuh")}
    long = sorted((n, f) for f, n in lengths.items() if n > LONGEST)

    figures = {"op": op, "circles": len(knots), "long": len(long)}
    rows = [
        ("op", f"mentions of `Op::`, in {op_files} files", op),
        ("circles", f"import circles, of {sum(len(c) for c, _ in knots)} files", len(knots)),
        ("long", f"files above {LONGEST} lines", len(long)),
        ("", "operands read by number (passes, codegen, runtime)", operands),
        ("", f"median lines of {len(production)} production files", int(statistics.median(production))),
    ]
    for key, what, value in rows:
        limit = f"at most {LIMITS[key]}" if key else ""
        print(f"{value:6}  {what:52} {limit}".rstrip())
    for n, f in long:
        print(f"        {n} {f}")
    if args.circles:
        for i, (circle, arrows) in enumerate(knots, 1):
            print(f"circle {i}: {' '.join(circle)}")
            for a in circle:
                for b in circle:
                    if names := arrows[a].get(b):
                        print(f"  {a} -> {b}: {', '.join(sorted(names))}")
    over = [key for key, limit in LIMITS.items() if figures[key] > limit]
    if args.check and over:
        print(f"above the limit: {', '.join(over)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
