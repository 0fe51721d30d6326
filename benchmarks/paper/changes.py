"""The table of an ablation: what each variant changes against the base, seed by seed."""

import re
import statistics

# the settings in which variants differ
OPTIONS = ("blocks", "targets", "zero_init", "ffn_rank", "cores", "trainable_scale")


def table(runs: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(head, lines): for each variant its parameters and, by method and data set, top-1 (base) or its mean change.

    Args:
        runs: rows of runs.csv.
    """
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        options = {key: run.get(f"settings.{key}") for key in OPTIONS}
        texts = (f"{key} {value}" for key, value in options.items() if value is not None)
        variant = re.sub(r"""[][()"']""", "", "; ".join(texts)) or "base"
        found.setdefault(variant, {}).setdefault(f"{run['method'].upper()}, {run['data']}", {})[run["seed"]] = run
    columns = list(dict.fromkeys(column for of in found.values() for column in of))
    lines = []
    for variant, of in found.items():
        in_order = [run for column in columns for run in of.get(column, {}).values()]
        counts = dict.fromkeys(f"{run['parameters'] / 1e6:.3f}" for run in in_order)
        lines.append([variant, ", ".join(counts), *(_change(of.get(c, {}), found["base"].get(c, {})) for c in columns)])
    return ["variant", "parameters (M)", *columns], lines


def _change(own: dict[int, dict], base: dict[int, dict]) -> str:
    pairs = [(run["top1"], 0.0 if own is base else base[seed]["top1"]) for seed, run in own.items() if seed in base]
    if any(None in pair for pair in pairs):
        return "diverged"
    gaps = [one - other for one, other in pairs]
    if not gaps:
        return "–"
    mean = f"{statistics.fmean(gaps):{'' if own is base else '+'}.1f}".replace("-", "−")
    return mean + (f" ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else "")
