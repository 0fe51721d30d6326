"""Build csrc/cuda as setup.py does, which needs no GPU, and check each compiled kernel against budget.json: registers,
and no stack (a kernel has no local arrays, so any stack is spilled registers).

    python tests/cuda/check.py             # prints a table; exit status 1 if anything is over; skips without nvcc
    python tests/cuda/check.py --all       # also for 9.0a where nothing has changed since the budget was written
    python tests/cuda/check.py --update    # writes what it found as the new budget, if nothing spills

The kernels for 9.0 take most of the time. While sources, setup.py and nvcc are those of the budget, 8.0 alone is
compiled.

The library must load, and all of it compile within three minutes on two cores. Shared memory, which is requested at
launch, is checked against the same budget by tests/test_cuda.py.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import triton.backends.nvidia

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from efft_kernels.kernels.build import digest
from efft_kernels.kernels.tuning.table import lines

BUDGET = Path(__file__).with_name("budget.json")
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"  # not every toolkit has one
CORES, SECONDS = 2, 180
# csrc/cpu, which all tests run as it is compiled at first use, must compile and link: at a quarter of the time
SETUP = """
import runpy, setuptools, sys
without = sys.argv.pop(1)
class Extension(setuptools.Extension):
    def __init__(self, name, *rest, extra_compile_args, **options):
        flags = extra_compile_args | {"cxx": [*extra_compile_args["cxx"], *["-O0"] * name.endswith("_cpu")]}
        flags["nvcc"] = [flag for flag in flags.get("nvcc", []) if not without or without not in flag]
        super().__init__(name, *rest, extra_compile_args=flags, **options)
setuptools.Extension = Extension
runpy.run_path("setup.py", run_name="__main__")
"""
LOADS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in "lowrank_linear lowrank_linear_backward lowrank_p group_update group_update_backward merge_".split():
    print(getattr(torch.ops.efft_cuda, name).default._schema)
"""


def nvcc() -> str | None:
    homes = [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    folders = [*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def sources() -> str:
    """The digest of all that the registers follow from, but for nvcc"""
    return hashlib.sha256((digest(ROOT / "csrc" / "cuda") + (ROOT / "setup.py").read_text()).encode()).hexdigest()[:32]


def build(without: str) -> Path:
    """Builds the library; sources that have not changed since the last time are not compiled again.

    without: an architecture that is left out, or "".
    """
    folder, objects = ROOT / "build" / "check", ROOT / "build" / "objects"
    command = [sys.executable, "-c", SETUP, without, "build_ext", "--build-lib", folder, "--build-temp", objects]
    environment = os.environ | {"EFFT_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the build failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    # Warnings of ptxas about waits that it had to add for matmuls in flight.
    if remarks := [line for line in (done.stdout + done.stderr).splitlines() if "(C75" in line]:
        sys.exit("products of the tensor cores wait for one another:\n" + "\n".join(remarks[:3]))
    return next(folder.glob("efft_kernels/_cuda*.so"))


def label(symbol: str) -> str:
    """A mangled name as lowrank_linear_kernel<Bf16, LinearTile<128, 128, 2, 1>, 16, true> and the like."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\((int|bool)\)|efft::cuda::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|^void ", "", name)
    return re.sub(r"\([^()]*\)$", "", name)


def kernels(library: Path) -> dict[str, dict[str, dict]]:
    """Returns {architecture: {kernel: registers and stack}}."""
    dump = subprocess.run([CUOBJDUMP, "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    found, arch = {}, None
    for line in dump.stdout.splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = label(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            numbers = [int(number) for number in match.groups()]
            if not name.startswith("hopper") or arch == "sm_90a":  # empty for other architectures, never launched
                found.setdefault(arch, {})[name] = {"registers": numbers[0], "stack": numbers[1] + numbers[2]}
    return found


def template(kernel: str) -> tuple[str, str]:
    """Splits a kernel's name into its template and the arguments of that."""
    name, _, arguments = kernel.partition("<")
    return name, arguments.removesuffix(">").strip()


def faults(found: dict, budget: int | None) -> list[str]:
    """Checks a kernel against its budget of registers (0: it has none), or with None only for the stack."""
    wrong = [f"{found['stack']} bytes spilled"] if found["stack"] else []
    if budget is not None and found["registers"] > budget:
        wrong.append(f"over the budget of {budget}" if budget else "not in the budget")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        print("skipped: no nvcc was found (CUDA_HOME, CUDA_PATH, PATH)")
        return 0
    version = re.search(r"V([\d.]+)", subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout)[1]
    budget = json.loads(BUDGET.read_text())
    same = budget["nvcc"] == version and not arguments.update
    if not same:
        print(f"nvcc {version}, the budget is of {budget['nvcc'] or 'none'}: only spills are checked")
    known = same and budget.get("sources") == sources() and not arguments.all
    start = time.perf_counter()
    library = build("90a" if known else "")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, wall = used.ru_utime + used.ru_stime, time.perf_counter() - start
    print(subprocess.run([sys.executable, "-c", LOADS, library], capture_output=True, text=True, check=True).stdout)
    found, bad = kernels(library), 0
    for arch, of_arch in found.items():
        for name, numbers in sorted(of_arch.items()):
            name_of_template, values = template(name)
            registers = budget["kernels"].get(arch, {}).get(name_of_template, {}).get(values, 0)
            wrong = faults(numbers, registers if same else None)
            wrong += ["empty"] * (name.startswith("hopper") and numbers["registers"] < 30)
            bad += bool(wrong)
            print(f"{arch:8}{name:72}{numbers['registers']:4} registers{'  FAULT: ' * bool(wrong)}{'; '.join(wrong)}")
    if known:
        print("sm_90a  as it was when the budget was written; --all compiles it")
    if missing := ({"sm_80"} if known else {"sm_80", "sm_90a"}) - set(found):
        bad += 1
        print(f"FAULT: not compiled for {', '.join(sorted(missing))}")
    # Processor time, because other programs may be running on this machine.
    count = sum(map(len, found.values()))
    print(f"{count} kernels, {bad} at fault; built in {cpu:.0f} s of processor time, {wall:.0f} s here")
    if cpu > CORES * SECONDS:
        bad += 1
        print(f"FAULT: that is more than {SECONDS} s on {CORES} cores")
    if arguments.update and not bad:
        BUDGET.write_text(written(version, budget["shared"], found))
    return int(bad > 0)


def written(version: str, shared: dict, found: dict) -> str:
    """The budget as JSON: of a kernel, which has no stack, the registers, by template and its arguments."""
    archs = {arch: {} for arch in found}
    for arch, of_arch in found.items():
        for name, numbers in sorted(of_arch.items()):
            name_of_template, values = template(name)
            archs[arch].setdefault(name_of_template, {})[values] = numbers["registers"]
    return lines({"nvcc": version, "sources": sources(), "shared": shared, "kernels": archs}) + "\n"


if __name__ == "__main__":
    sys.exit(main())
