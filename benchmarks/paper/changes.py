"""The table of an ablation: what each variant changes against the base, seed by seed."""

import re
import statistics

# the settings in which variants differ
OPTIONS = ("blocks", "targets", "zero_init", "ffn_rank", "cores", "trainable_scale")


def table(runs: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(head, lines): for each variant its parameters and, by method and data set, top-1 (base) or its mean change.

    Args:
        runs: rows of runs.csv.

    Raises:
        ValueError: runs of a method and data set differ in more than a variant does, so a change would be of both.
    """
    found: dict[str, dict[str, dict[int, dict]]] = {}
    others: dict[str, set[str]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        settings = {key[9:]: v for key, v in run.items() if key.startswith("settings.") and v is not None}
        options = {key: settings.pop(key, None) for key in OPTIONS}
        other, column = {f"{key} {value}" for key, value in settings.items()}, f"{run['method'].upper()}, {run['data']}"
        if differ := sorted(other ^ others.setdefault(column, other)):
            raise ValueError(f"runs of {column}: expected them to differ in {', '.join(OPTIONS)} alone, got {differ}")
        texts = (f"{key} {value}" for key, value in options.items() if value is not None)
        variant = re.sub(r"""[][()"']""", "", "; ".join(texts)) or "base"
        found.setdefault(variant, {}).setdefault(column, {})[run["seed"]] = run
    columns = list(dict.fromkeys(column for of in found.values() for column in of))
    lines = []
    for variant, of in found.items():
        in_order = [run for column in columns for run in of.get(column, {}).values()]
        # a run that diverged has none
        counts = dict.fromkeys(f"{run['parameters'] / 1e6:.3f}" for run in in_order if run.get("parameters"))
        changes = [_change(of.get(column, {}), found.get("base", {}).get(column, {})) for column in columns]
        lines.append([variant, ", ".join(counts) or "–", *changes])
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
