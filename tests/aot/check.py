"""Compile every Triton kernel with its shipped configurations for GPUs that need not be there, and hold what the
compiler made of them to budget.json: registers, stack (a kernel has no local arrays: any stack is spilled registers),
shared memory, tensor-core instructions.

    python tests/aot/check.py             # prints a table; exit status 1 if anything is over
    python tests/aot/check.py --all       # every chip, whether or not anything changed since the budget was written
    python tests/aot/check.py --update    # writes what it found as the new budget, if nothing spills or is too large

What the compiler makes of the same kernels, tiles and calls with the same Triton is the same. While all that is what
the budget was written of, only the kernels for CHIP are compiled, to see that it is so.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# compiled code, never the interpreter, and never a result of an earlier compile
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource

from efft_kernels.kernels.triton.dy_pass import dy_pass_kernel, reduce_slots_kernel
from efft_kernels.kernels.triton.group_update import group_update_backward_kernel, group_update_kernel
from efft_kernels.kernels.triton.launch import DEFAULTS
from efft_kernels.kernels.triton.lowrank_linear import lowrank_linear_kernel, p_kernel
from efft_kernels.kernels.triton.merge import merge_kernel, merge_row_kernel
from efft_kernels.kernels.triton.mixed_linear import mixed_reduce_kernel
from efft_kernels.kernels.tuning import table

BUDGET = Path(__file__).with_name("budget.json")
CHIP = "sm_90"
# bytes of shared memory that a program may have
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448}
TENSOR_CORE = {"mma.sync": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma"}
KINDS = {"half": ["bf16", "fp16"], "tf32": ["fp32"], "fp32": ["fp32"]}


def source(kernel, dtype: str, constants: dict, pointers: str, types: dict, ragged: bool) -> ASTSource:
    """a call of the kernel as a launch with sizes and strides divisible by 16 would specialise it; ragged: by others

    pointers: names of the arguments that point to dtype; types: other types by name; constants: by name, None too.
    What is left are 32-bit sizes and strides.
    """
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name) or (f"*{dtype}" if name in pointers.split() else "i32")
        for name in kernel.arg_names
    }
    # a constant 1 stands for a contiguous stride; triton specialises those by itself at a launch
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if not ragged and (signature[name] == "i32" or signature[name].startswith("*"))
    }
    return ASTSource(
        kernel, signature, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()}, attrs=divisible
    )


def variants(name: str, use: dict, where: dict, kind: str):
    """(variant, kernel, constants, pointers, types) for each way in which a row's kernel is launched"""
    use = {k: v for k, v in use.items() if k not in ("num_warps", "num_stages")}
    given = use | {"PRECISION": "tf32" if kind == "tf32" else "ieee"}
    # the largest block of ranks that the row is launched with
    BR = min(where.get("max_R", 256), use.get("BR", 64))
    if name == "group_update":
        yield "", group_update_kernel, given | {"sq": 1, "svn": 1}, "sigma v up", {"scale": "fp32"}
    elif name == "group_update_backward":
        ones = {"sdn": 1, "sq": 1, "svn": 1}
        for variant, none in (("", {}), ("dsigma", {"dv": None}), ("dv", {"dsigma": None})):
            yield (
                variant,
                group_update_backward_kernel,
                given | ones | none,
                "dup sigma v dsigma dv",
                {"scale": "fp32"},
            )
    elif name == "p":
        yield "x", p_kernel, given | {"sxk": 1, "sdr": 1, "ids": None}, "x down p", {}
        yield "dy", p_kernel, given | {"sxk": 1, "sdk": 1, "ids": None}, "x down p", {}
        yield "x mixed", p_kernel, given | {"sxk": 1, "sdr": 1}, "x down p", {"ids": "*i64"}
    elif name in ("single_pass", "extended_k"):
        own_p = name == "single_pass"
        given |= {"BR": BR, "OWN_P": own_p} | ({} if own_p else {"down": None, "sdk": 0, "sdr": 0})
        # the forward's operands, then those of dx: weight and the factors are transposed
        forward = {"sxk": 1, "swk": 1, "sb": 1, "sun": 1, "W_ROWS": "n"} | ({"sdr": 1} if own_p else {})
        backward = {"sxk": 1, "swn": 1, "bias": None, "sb": 0, "sur": 1, "W_ROWS": "k"} | ({"sdk": 1} if own_p else {})
        for way, ones in (("y", forward), ("dx", backward)):
            # the pointer path stands in where descriptors cannot address the operands
            for tma in (True, False) if use["TMA"] else (False,):
                BM, BN, BK = use["BM"], use["BN"], use["BK"]
                w_block = [BN, BK] if way == "y" else [BK, BN]
                types = (
                    {"x": f"tensordesc<$[{BM},{BK}]>", "w": f"tensordesc<$[{w_block[0]},{w_block[1]}]>"} if tma else {}
                )
                variant = f"{way} tma" if tma else way
                constants = given | ones | {"TMA": tma}
                yield variant, lowrank_linear_kernel, constants | {"ids": None}, "x w bias down up y p", types
                if (tma or not use["TMA"]) and (not own_p or BR >= 64):
                    constants["BR"] = BR // 4 if own_p else 16  # as mixed_rank() has it
                    yield (
                        f"{variant} mixed",
                        lowrank_linear_kernel,
                        constants,
                        "x w bias down up y p",
                        types | {"ids": "*i64"},
                    )
    elif name == "dy_pass":
        pointers, types = "dy up p dp_slots dup_slots", {"dp_slots": "*fp32", "dup_slots": "*fp32"}
        ones = given | {"syn": 1, "spr": 1}
        yield "dp dup", dy_pass_kernel, ones | {"sun": 1, "sn": 1}, pointers, types
        no_dp = {"up": None, "dp_slots": None, "sur": 0, "sun": 0, "sr": 1}
        yield "ddown", dy_pass_kernel, ones | no_dp, pointers, types
    elif name == "reduce":
        types = {"a_slots": "*fp32", "b_slots": "*fp32"}
        yield "", reduce_slots_kernel, use, "a b", types
        yield "mixed", mixed_reduce_kernel, use, "out", {"slots": "*fp32", "ids": "*i64"}
    elif name == "merge":
        for aligned in (True, False):
            constants = use | {"BC": 64, "ALIGNED": aligned}
            yield "aligned" if aligned else "", merge_kernel, constants, "like", {"table": "*i64", "starts": "*i32"}
        if kind == "half":  # the same for every dtype
            addresses = dict.fromkeys(("weight", "down", "up"), "i64")
            yield "row", merge_row_kernel, {}, "", {"table": "*i64", "starts": "*i32"} | addresses


def cases():
    """(case, arch, (kernel, constants, pointers, types), dtype, warps, stages, ragged)

    bfloat16 for all, float16 once each.
    """
    seen = set()
    ragged = {"kind": ["half"], "max_R": 64}  # of a single pass; the other kernels' blocks of ranks are smaller
    for arch in SHARED:
        rows = [(name, row["where"], row["use"]) for name, of in DEFAULTS["defaults"][arch].items() for row in of]
        for name, where, use in rows + [(name, ragged, use) for name, use in DEFAULTS["ragged"].items()]:
            tiles = "x".join(str(size) for tile, size in use.items() if tile.startswith("B"))
            for kind in where["kind"] if name != "reduce" else ["half"]:
                for variant, *rest in variants(name, use, where, kind):
                    ranks = f" r{rest[1]['BR']}" if name in ("single_pass", "extended_k") else ""
                    ranks += " ragged" * (where is ragged)
                    for dtype in KINDS[kind] if (arch, name, kind) not in seen else KINDS[kind][:1]:
                        seen.add((arch, name, kind))
                        label = dtype if kind == "half" else kind
                        case = " ".join(f"{name} {variant} {label} {tiles}{ranks}".split())
                        yield case, arch, rest, dtype, use["num_warps"], use["num_stages"], where is ragged


def tool(name: str) -> str:
    return str(Path(nvidia).parent / "bin" / name)


def compiled(number: int) -> tuple[str, str, dict | str]:
    """(case, arch, what the compiler made of it or its error)"""
    case, arch, (kernel, constants, pointers, types), dtype, warps, stages, ragged = ALL[number]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: text.replace("$", dtype) for name, text in types.items()}
    try:
        done = triton.compile(
            source(kernel, dtype, constants, pointers, types, ragged),
            target=GPUTarget("cuda", int(arch[3:]), 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    except Exception as error:
        return case, arch, f"{type(error).__name__}: {error}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL"))
    found = {
        "registers": registers,
        "stack": stack + local,
        "shared": done.metadata.shared,
        "tensor_cores": [name for name, pattern in TENSOR_CORE.items() if re.search(pattern, done.asm["ptx"])],
    }
    return case, arch, found


def faults(case: str, arch: str, found: dict | str) -> list[str]:
    """what is wrong with a compiled case on any version of triton"""
    if isinstance(found, str):
        return [found.splitlines()[0]]
    wrong = []
    if found["shared"] > SHARED[arch]:
        wrong.append(f"shared memory over the {SHARED[arch]} of the chip")
    if not found["tensor_cores"] and not re.search(r"^reduce|^merge row|^merge.* tf32|fp32\b", case):
        wrong.append("no tensor-core instruction")
    return wrong


def spilled(found: dict) -> list[str]:
    # demanded of the budget's version alone: another one's ptxas may spill a register or two of the same tiles
    return [f"{found['stack']} bytes spilled"] if found["stack"] else []


def excesses(found: dict, limit: list | None) -> list[str]:
    """in what a compiled case differs for the worse from its entry in the budget"""
    if limit is None:
        return ["not in the budget"]
    registers, shared, *tensor_cores = limit
    allowed = {"registers": registers, "shared": shared}
    wrong = [f"{what} over the budget of {most}" for what, most in allowed.items() if found[what] > most]
    if found["tensor_cores"] != tensor_cores:
        wrong.append(f"the budget has {tensor_cores}")
    return wrong


def digest() -> str:
    """Of what a compile depends on besides Triton: the kernels with their tiles, and the calls in this file"""
    folder = Path(__file__).parents[2] / "efft_kernels" / "kernels" / "triton"
    files = [*sorted(folder.glob("*.py")), folder.parent / "tuning" / "triton_configs.json", Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:32]


ALL = list(cases())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    arguments = parser.parse_args()
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() and not arguments.update else None
    same = budget is not None and budget["triton"] == triton.__version__
    if budget and not same:
        print(
            f"triton {triton.__version__}, the budget is of {budget['triton']}: only the chips' own limits are checked"
        )
    only = arguments.only
    if same and not (arguments.all or only) and budget["sources"] == digest():
        print(f"nothing changed since the budget was written: only {CHIP} is compiled (all chips: --all)")
        only = CHIP
    chosen = [i for i, case in enumerate(ALL) if only in f"{case[1]} {case[0]}"]
    result, bad = {}, 0
    print(f"{'':8}{'case':46}{'registers':>10}{'stack':>7}{'shared':>8}  tensor cores")
    with multiprocessing.Pool(2) as pool:
        for case, arch, found in pool.imap(compiled, chosen):
            wrong, cells = faults(case, arch, found), ""
            if isinstance(found, dict):
                cells = "{registers:>10}{stack:>7}{shared:>8}  ".format(**found) + " ".join(found["tensor_cores"])
                wrong += spilled(found) if same or not budget else []
                wrong += excesses(found, _of_kernel(budget["cases"].get(arch, {}), case)) if same else []
            bad += bool(wrong)
            print(f"{arch:8}{case:46}{cells}{'  FAULT: ' + '; '.join(wrong) if wrong else ''}", flush=True)
            result.setdefault(arch, {})[case] = found
    print(f"{len(chosen)} compiled, {bad} at fault")
    if arguments.update and not bad and not arguments.only:
        BUDGET.write_text(written(result))
    return 1 if bad else 0


def _of_kernel(kernels: dict, case: str) -> list | None:
    kernel, _, rest = case.partition(" ")
    return kernels.get(kernel, {}).get(rest)


def written(result: dict) -> str:
    """the budget as JSON; of each case the registers, the bytes of shared memory and the tensor-core instructions"""
    cases: dict = {}
    for arch, found in result.items():
        for case, f in found.items():
            kernel, _, rest = case.partition(" ")
            of_kernel = cases.setdefault(arch, {}).setdefault(kernel, {})
            of_kernel[rest] = [f["registers"], f["shared"], *f["tensor_cores"]]
    return table.lines({"triton": triton.__version__, "sources": digest(), "cases": cases}) + "\n"


if __name__ == "__main__":
    sys.exit(main())
