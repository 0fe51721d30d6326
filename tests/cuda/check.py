"""Compile every .cu of csrc/cuda for GPUs that need not be there, and hold what the compiler made of each kernel to
budget.json: registers, and no spills (a kernel has no local arrays: any stack is spilled registers).

    python tests/cuda/check.py             # prints a table; exit status 1 if anything is over; skips without nvcc
    python tests/cuda/check.py --update    # writes what it found as the new budget, if nothing spills

What all of it takes to compile is printed, and held to three minutes on two cores. Shared memory, which is asked for at a
launch, is held to the same budget by tests/test_cuda.py.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "cuda"
BUDGET = Path(__file__).with_name("budget.json")
ARCHS = ("80", "90a", "100")
CORES, SECONDS = 2, 180


def nvcc() -> str | None:
    homes = [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def label(symbol: str) -> str:
    """lowrank_linear_kernel<Bf16, LinearTile<128, 128, 2, 1>, 16, true> and the like, of a mangled name"""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((int|bool)\)|efft::cuda::|\(anonymous namespace\)::|_INTERNAL_\w+::|^void ", "", name)
    return re.sub(r"\([^()]*\)$", "", name)


def compiled(job: tuple[str, str, Path]) -> tuple[str, dict | str]:
    """(arch, {kernel: registers and stack}, or the compiler's error)"""
    compiler, arch, source = job
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "--resource-usage"]
        done = subprocess.run([*command, "-c", source, "-o", f"{folder}/x.o"], capture_output=True, text=True)
    if done.returncode:
        return arch, f"{source.name}: {done.stderr.strip()[-2000:]}"
    found = {}
    for part in re.split(r"Compiling entry function '", done.stdout + done.stderr)[1:]:
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[label(part[: part.index("'")])] = {"registers": registers, "stack": int(stack), "spilled": int(stores) + int(loads)}
    return arch, found


def faults(found: dict, limit: dict | None) -> list[str]:
    wrong = [f"{found[what]} bytes of {what}" for what in ("stack", "spilled") if found[what]]
    if limit and found["registers"] > limit["registers"]:
        wrong.append(f"registers over the budget of {limit['registers']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        print("skipped: no nvcc beside its headers was found (CUDA_HOME, CUDA_PATH, PATH)")
        return 0
    version = re.search(r"V([\d.]+)", subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout)[1]
    budget = json.loads(BUDGET.read_text())
    same = budget["nvcc"] == version and not arguments.update
    if not same and not arguments.update:
        print(f"nvcc {version}, the budget is of {budget['nvcc']}: only spills are checked")
    jobs = [(compiler, arch, source) for source in sorted(CSRC.glob("*.cu"), reverse=True) for arch in ARCHS]
    start, kernels, bad = time.perf_counter(), {arch: {} for arch in ARCHS}, 0
    with ThreadPoolExecutor(CORES) as pool:
        for arch, found in pool.map(compiled, jobs):
            if isinstance(found, str):
                print(f"sm_{arch}: FAULT: {found}")
                bad += 1
                continue
            kernels[arch] |= found
            for name, numbers in found.items():
                limit = budget["kernels"].get(arch, {}).get(name) if same else None
                wrong = faults(numbers, limit) + (["not in the budget"] if same and limit is None else [])
                bad += bool(wrong)
                print(f"sm_{arch:5}{name:75}{numbers['registers']:4} registers{'  FAULT: ' * bool(wrong)}{'; '.join(wrong)}", flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, wall = used.ru_utime + used.ru_stime, time.perf_counter() - start
    slow = cpu > CORES * SECONDS
    print(f"{sum(map(len, kernels.values()))} compiled, {bad} at fault, in {cpu:.0f} s of processor time, {wall:.0f} s here")
    if slow:
        print(f"FAULT: that is more than {SECONDS} s on {CORES} cores")
    if arguments.update and not bad:
        lines = ",\n".join(
            f'    "{arch}": {{\n' + ",\n".join(f"      {json.dumps(n)}: {json.dumps(k)}" for n, k in sorted(found.items())) + "\n    }"
            for arch, found in kernels.items()
        )
        shared = json.dumps(budget["shared"], indent=4).replace("\n}", "\n  }")
        BUDGET.write_text(f'{{\n  "nvcc": "{version}",\n  "shared": {shared},\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    return 1 if bad or slow else 0


if __name__ == "__main__":
    sys.exit(main())
