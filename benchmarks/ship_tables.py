"""Puts what gpu.py tuned and recorded into the shipped tables, efft_kernels/kernels/tuning/*_configs.json.

    python benchmarks/ship_tables.py benchmarks/results/<gpu>

Of each backend the tuned entries, and `proven`, which lets it be chosen automatically on that GPU, as far as the
records show it: clean and complete runs in which it was there, the tests and both sanitizers passed, and it was faster
than plain torch. triton is then chosen for sizes that were not measured too, and must be faster in every sum over a
model's Linears; cuda only where its table says so, and must be in one Linear.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from bench_forward import summary
from efft_kernels.kernels.tuning.table import Table
from record import read_run

ROOT = Path(__file__).resolve().parents[1]
TABLES = {"triton": Table("triton_configs.json"), "cuda": Table("cuda_configs.json")}
CHECKS = ("build", "tests", "memcheck", "racecheck")


def read(path: Path, *keys: str) -> dict:
    """ValueError that names the file and what was expected of it"""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file that gpu.py made: {error}") from error
    if not isinstance(found, dict) or (missing := [key for key in keys if key not in found]):
        raise ValueError(f"{path}: expected {', '.join(missing if isinstance(found, dict) else keys)}, not there")
    return found


def name(path: Path) -> str:
    """as a table names a record"""
    return path.relative_to(ROOT).as_posix()


def tests(folder: Path, gpu: dict) -> str:
    """the record that shows the kernels right; ValueError where it does not"""
    path = folder / "gpu.json"
    outcome = {step["step"]: step["outcome"] for step in gpu["steps"]}
    if not gpu["commit"] or gpu["commit"]["dirty"]:
        raise ValueError(f"{path} is not of a clean commit")
    for step in CHECKS:
        if outcome.get(step) != "passed":
            raise ValueError(f"{path}: {step} {outcome.get(step, 'not run')}")
    return name(path)


def benchmark(folder: Path, gpu: str, backend: str) -> str:
    """the records that show it faster; ValueError where they do not"""
    paths, faster, variant = sorted(folder.glob("*/forward.json")), [], f"efft_{backend}"
    for path in paths:
        record = read_run(path, "complete", "commit", "machine", "backends")
        if not record["complete"] or not record["commit"] or record["commit"]["dirty"]:
            raise ValueError(f"{path} is not a complete run of a clean commit")
        if (record["machine"]["gpu"] or {}).get("name") != gpu:
            raise ValueError(f"{path} is not of an {gpu}")
        if not any(b["name"] == backend and b["available"] for b in record["backends"]):
            raise ValueError(f"{path}: {backend} was not there")
        if backend == "cuda":
            won = [row for row in record["results"] if row["variant"] == variant]
            faster += [path] if any(row["ratio_unfused"] < 1 for row in won if row.get("ratio_unfused")) else []
            continue
        for case in summary(record["results"]):
            ms, torch_ms = case["ms"].get(variant), case["ms"].get("unfused")
            if ms is None or torch_ms is None or ms >= torch_ms:
                what = f"{case['size']} {case['dtype']} {case['pass']}"
                raise ValueError(f"{path}: {variant} took {ms} ms, plain torch {torch_ms} ms, {what}")
        faster.append(path)
    if not faster:
        raise ValueError(f"no {folder}/*/forward.json shows {variant} faster than plain torch")
    return ", ".join(map(name, faster))


class Shipment(NamedTuple):
    """What one backend's table gets, and what was found for it and what not, in sentences"""

    gpu: str
    tuned: dict[str, dict]
    proven: dict[str, str]
    said: list[str]


def prepare(folder: Path, backend: str) -> Shipment:
    gpu = read(folder / "gpu.json", "machine", "commit", "steps")
    model, table = (gpu["machine"]["gpu"] or {}).get("name"), TABLES[backend]
    path = folder / "tables" / table.shipped.name
    if not path.exists():
        return Shipment(model, {}, {}, [f"{backend}: nothing tuned, {path} is not there"])
    made, shipped = read(path, "format", "gpus"), json.loads(table.shipped.read_text())
    if made["format"] != shipped["format"] or model not in made["gpus"]:
        raise ValueError(
            f"{path}: expected format {shipped['format']} and an entry for {model}, got format {made['format']} and "
            f"{sorted(made['gpus'])}"
        )
    tuned = made["gpus"][model]["tuned"]
    said, proven = [f"{backend}: {len(tuned)} tuned entries of an {model}"], {}
    for what, show in (("tests", lambda: tests(folder, gpu)), ("benchmark", lambda: benchmark(folder, model, backend))):
        try:
            proven[what] = show()
            said.append(f"{backend}: {what} on record, {proven[what]}")
        except ValueError as error:
            said.append(f"{backend}: {what} not on record, {error}")
    return Shipment(model, tuned, proven, said)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="benchmarks/results/<gpu>, as gpu.py wrote it")
    folder = parser.parse_args(argv).folder.resolve()
    try:
        if not folder.is_relative_to(ROOT):
            raise ValueError(f"{folder}: expected a folder of {ROOT}, which is committed with the tables that name it")
        shipments = {backend: prepare(folder, backend) for backend in TABLES}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for backend, found in shipments.items():
        if found.tuned:
            TABLES[backend].ship(found.gpu, found.tuned, found.proven)
        print(*found.said, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
