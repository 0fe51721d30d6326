"""Runs of efft-finetune: interrupted and resumed, divided into parts and processes, on a full disk."""

import contextlib
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from models import timm, vit_of_transformers
from refusals import refuses

timm()
for package in ("accelerate", "torchmetrics", "jsonargparse", "tensorboard"):
    pytest.importorskip(package)
import numpy as np
from accelerate.state import PartialState
from PIL import Image
from safetensors.torch import load_file
from test_finetune_data import folder, lists

from efft_kernels import read_adapter, save_adapter, storage
from efft_kernels.finetune import checkpoints, cli, evaluation, finished, loop, outputs, prepared
from efft_kernels.finetune.finished import merged, restore
from efft_kernels.finetune.labelling import label
from efft_kernels.finetune.loop import Interrupted, train
from efft_kernels.finetune.methods import METHODS
from efft_kernels.finetune.models import make_model
from efft_kernels.finetune.settings import Settings

pytestmark = pytest.mark.usefixtures("undrawn_module")  # tests/test_finetune_commands.py has the figures


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = folder(tmp_path_factory.mktemp("photos"), ("train", "val", "test"), ("a", "b", "c"), n=8)
    shutil.copy(root / "test/a/0.png", root / "test/a/odd.png")  # two processes cannot share 25 images evenly
    return root


def tiny(data, out, **changes) -> Settings:
    """Settings of a run on 24 images, 3 steps per epoch, with every source of randomness."""
    fixed = dict(model="test_vit", checkpoint="random", image_size=32, batch_size=8, epochs=6, lr=3e-3, rank=4)
    random_ = dict(augment="flip", drop_path=0.2, workers=0, save_every=2, device="cpu")
    return Settings(str(data), str(out), **{**fixed, **random_, **changes})


def end(out) -> dict:
    """The results of a run, which must not depend on interruptions."""
    record = json.loads((Path(out) / "metrics.json").read_text())
    weights = load_file(Path(out) / "adapter.safetensors")
    assert not checkpoints.states(Path(out)) and not list(Path(out).glob(f"{storage.PARTIAL}*"))
    return {
        "metrics": record["result"]["metrics"],
        "epoch": record["result"]["epoch"],
        "history": record["history"],
        # not the bytes of the file, because the order of its metadata is arbitrary
        "adapter": {key: (str(t.dtype), t.shape, t.numpy().tobytes()) for key, t in weights.items()},
    }


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The results of a run that was not interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    train(tiny(photos, out), progress=False)
    return end(out)


def forked(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def start(settings, prepare=lambda: None):
    def run():
        torch.set_num_threads(1)
        prepare()
        try:
            train(settings, progress=False)
        except checkpoints.StorageError as error:
            print(error, file=sys.stderr)
            os._exit(cli.STORAGE)
        os._exit(0)

    return forked(run)


def train_in_two_processes(settings):
    """As a launcher starts a run, but forked, because the two would import for longer than they train."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def prepare(rank):
        PartialState._reset_state()  # of a run in this process
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="localhost")

    processes = [start(settings, lambda: prepare(rank)) for rank in range(2)]
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def killed_and_resumed(settings, kills: int, seed: int, seconds: float) -> int:
    """Kill a run repeatedly, then let it finish; returns the number of kills that found it running.

    A kill comes up to ``seconds`` after the run has written a checkpoint, or sometimes at a moment of its start.
    """
    draw, met = random.Random(seed), 0
    for _ in range(kills):
        known = checkpoints.states(Path(settings.out))
        process = start(settings)
        while draw.random() > 0.01 and checkpoints.states(Path(settings.out)) == known and process.is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, seconds))
        met += process.is_alive()
        process.kill()
        process.join()
    last = start(settings)
    last.join()
    assert last.exitcode == 0
    return met


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(photos, whole, tmp_path):
    kills = int(os.environ.get("EFFT_KILLS", 3))  # other numbers come at other moments, too
    assert killed_and_resumed(tiny(photos, tmp_path / "out"), kills, seed=kills, seconds=0.15) >= 1
    assert end(tmp_path / "out") == whole


def at_call(owner, name, number, act, after=False, put=setattr):
    """Act at the n-th call of a function, before or after the call, with its arguments."""
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        now = next(calls) == number
        if now and not after:
            act(*args, **kwargs)
        result = original(*args, **kwargs)
        if now and after:
            act(*args, **kwargs)
        return result

    put(owner, name, counted)


def _die_in(name, number):
    """Kill the process at the n-th call of a function of os: before the call if n is odd, after it if n is even."""
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    return lambda: at_call(os, name, number, die, after=number % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_while_a_file_is_written(name, photos, whole, tmp_path):
    # the last calls write the adapter, the curves and the metrics
    for number in (1, 4, 9, 10, 11, 12, 13, 14) if name == "replace" else (3, 20):
        process = start(tiny(photos, tmp_path), _die_in(name, number))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    train(tiny(photos, tmp_path), progress=False)
    assert end(tmp_path) == whole


@pytest.fixture(scope="module")
def halfway(photos, tmp_path_factory):
    """A folder of a run that was killed, with two states."""
    out = tmp_path_factory.mktemp("halfway")
    start(tiny(photos, out), _die_in("replace", 3)).join()
    assert len(checkpoints.states(out)) == 2
    return out


def test_forty_flipped_bits_in_a_state_are_noticed(halfway, tmp_path):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    older, newest = checkpoints.states(tmp_path)
    good, draw, said = newest.read_bytes(), random.Random(0), []
    before = checkpoints._read(older)["step"]
    for place in [*draw.sample(range(8 * len(good)), 34), 0, 7, *(8 * len(good) - k for k in (1, 100, 257, 321))]:
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        newest.write_bytes(data)
        assert checkpoints.load(tmp_path, said.append)["step"] == before
    newest.write_bytes(b"")
    assert checkpoints.load(tmp_path, said.append)["step"] == before and "its contents differ" in said[-1]
    assert len(said) == 41 and all(f"{newest} is damaged and skipped: " in sentence for sentence in said)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s | {"weights": {}}, "it must have weights"),
        (lambda s: s | {"step": 999}, "not the state of the step in its name"),
        (lambda s: s | {"history": []}, "it must have a history of 1 epochs"),
        (lambda s: s | {"optimizer": {"state": {}}}, "its optimizer is for other parameters"),
        (lambda s: s | {"optimizer": {"state": {"b": {}}}}, "its optimizer is for other parameters"),
        (lambda s: {"step": s["step"], "other": 1}, "it has no identity"),
        (lambda s: [1], "not the state of the step in its name"),
        (lambda s: s | {"identity": s["identity"] | {"rank": 5}, "weights": {}}, "skipped: out must be a new folder"),
    ],
)
def test_the_state_before_a_wrong_one_is_taken(change, says, halfway, photos, tmp_path, caplog):
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    older, newest = checkpoints.states(tmp_path)
    content = change(checkpoints._read(newest))
    newest.unlink()
    checkpoints.save(tmp_path, int(newest.stem[6:]), content)
    settings = tiny(photos, tmp_path)
    accelerator, data = prepared.make_accelerator(settings), prepared.open_images(settings, 1)
    _, saved = prepared.prepare(settings, accelerator, tmp_path, data, False)
    loop._reset_accelerate()
    assert saved["step"] == int(older.stem[6:])
    assert f"{newest} is " in caplog.text and says in caplog.text


def test_a_new_state_outlives_later_ones_that_were_skipped(tmp_path):
    for step in (90, 100, 10, 20, 30):
        path = checkpoints.save(tmp_path, step, {"step": step})
        (tmp_path / "state-best.pt").touch()  # of the user
    assert [int(there.stem[6:]) for there in checkpoints.states(tmp_path)] == [20, 30] and path.is_file()


def test_images_that_were_replaced_are_noticed(halfway, photos, tmp_path):
    shutil.copytree(halfway, tmp_path / "out")
    shutil.copytree(photos, tmp_path / "photos")
    assert checkpoints.load(tmp_path / "out", pytest.fail)
    image = next((tmp_path / "photos" / "train" / "a").iterdir())
    data = bytearray(image.read_bytes())
    data[-20] ^= 1  # of the same size in bytes
    image.write_bytes(data)
    train(tiny(photos, tmp_path / "finished", epochs=1), progress=False)
    for settings in (tiny(photos, tmp_path / "out"), tiny(photos, tmp_path / "finished", epochs=1)):
        changed, says = replace(settings, data=str(tmp_path / "photos")), "differs in the contents of the images"
        refuses(ValueError, says, train, changed, progress=False)


def test_a_folder_is_of_one_run_and_not_of_its_workers(tmp_path):
    def try_lock():
        checkpoints._locked.clear()  # a process of its own
        with contextlib.suppress(ValueError), checkpoints.alone(tmp_path):
            os._exit(0)
        os._exit(3)

    with checkpoints.alone(tmp_path):
        refuses(ValueError, "another process is training", checkpoints.alone(tmp_path).__enter__)
        (other := forked(try_lock)).join()
        assert other.exitcode == 3

    def hold():
        with checkpoints.alone(tmp_path):
            if os.fork() == 0:  # as a worker that reads images
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    forked(hold).join()
    with checkpoints.alone(tmp_path):
        pass


COMMAND = [sys.executable, "-m", "efft_kernels.finetune.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
FLAGS = (
    "--model test_vit --checkpoint random --image-size 32 --batch_size=8 --epochs 6 --lr 3e-3 --rank 4 --augment flip "
    "--drop_path 0.2 --save_every 2 --device cpu"
).split()


@pytest.mark.slow
def test_sigterm_saves_and_says_so(photos, whole, tmp_path, capsys):
    """The command is stopped and run again, with worker processes."""
    flags = ["--data", str(photos), "--out", str(tmp_path), *FLAGS, "--workers", "1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*COMMAND, *flags, "--memory", "0"], env=ENVIRONMENT, start_new_session=True, **pipes)
    while not checkpoints.states(tmp_path) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGTERM)  # also to the workers, as timeout and systemd do
    out, err = process.communicate(timeout=120)
    if process.returncode != 0:  # zero if it had finished already
        assert process.returncode == cli.INTERRUPTED, err
        last = err.strip().splitlines()[-1]
        assert "stopped after step" in last and "the same command" in last
        step = int(last.split("step ")[1].split()[0])
        assert checkpoints.states(tmp_path)[-1].name == f"state-{step:09d}.pt"
        assert cli.main(flags) == cli.DONE
        out = capsys.readouterr().out
    assert end(tmp_path) == whole, err
    assert f"efft-finetune export {tmp_path} --to weights" in out


@pytest.mark.slow
def test_sigterm_in_the_same_process(photos, whole, tmp_path, monkeypatch):
    at_call(loop, "one_step", 4, lambda *_: os.kill(os.getpid(), signal.SIGTERM), put=monkeypatch.setattr)
    before = [*map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))]
    refuses(Interrupted, "stopped after step 4 of 18", train, tiny(photos, tmp_path), progress=False)
    assert [*map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))] == before
    train(tiny(photos, tmp_path), progress=False)
    assert end(tmp_path) == whole


@pytest.fixture
def disk(tmp_path):
    """A small file system, if this process may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
def test_full_disk(disk, photos, whole, capfd):
    def fill(*_):
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    process = start(tiny(photos, disk / "out"), lambda: at_call(checkpoints, "save", 3, fill))
    process.join()
    assert process.exitcode == cli.STORAGE
    said = capfd.readouterr().err.strip().splitlines()[-1]
    parts = "no space left", "state of step 6 could not be written", "state of step 4 is complete", "same command"
    assert all(words in said for words in parts), said
    assert len(checkpoints.states(disk / "out")) == 2 and not list((disk / "out").glob(f"{storage.PARTIAL}*"))
    (disk / "filler").unlink()
    train(tiny(photos, disk / "out"), progress=False)
    assert end(disk / "out") == whole


@pytest.fixture(scope="module")
def nearly(photos, tmp_path_factory):
    """A folder of a run that was killed before its last two steps."""
    out = tmp_path_factory.mktemp("nearly")
    start(tiny(photos, out), _die_in("replace", 8)).join()
    assert checkpoints.states(out)[-1].name == "state-000000016.pt"
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("number", range(1, 7), ids="state adapter curves predictions report metrics".split())
def test_a_failing_write(name, number, nearly, photos, whole, tmp_path, monkeypatch):
    """One of the last files cannot be written, and none that was written before is lost."""
    shutil.copytree(nearly, tmp_path, dirs_exist_ok=True)
    fail = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    call = number if name == "replace" else 2 * number - 1  # every file is followed by its folder
    at_call(os, name, call, fail, put=monkeypatch.setattr)
    says = "no space left in .* could not be written; .* same command"
    with pytest.raises(checkpoints.StorageError, match=says) as error:
        train(tiny(photos, tmp_path), progress=False)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert checkpoints.states(tmp_path) and not list(tmp_path.glob(f"{storage.PARTIAL}*"))
    train(tiny(photos, tmp_path), progress=False)
    assert end(tmp_path) == whole


def test_a_single_class_and_a_small_disk_are_seen_before_the_first_step(photos, tmp_path, monkeypatch):
    settings, root = tiny(photos, tmp_path / "out"), folder(tmp_path / "photos", classes=("cat",), n=12)
    says = "must have at least 2 classes, but has 1"
    refuses(ValueError, says, train, replace(settings, data=str(root)), progress=False)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda path: Mock(free=10 * 2**20))
    says = "has 10 MiB free, but .* take up to 6. MiB"
    refuses(checkpoints.StorageError, says, train, settings, progress=False)


EXACT = dict(dtype="float64", drop_path=0.0, factor_dropout=0.0, epochs=3)


@pytest.fixture(scope="module")
def exact(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact")
    train(tiny(photos, out, **EXACT), progress=False)
    return out


def assert_close_runs(out, want):
    """Metrics are equal except for the rounding of the loss, and weights within 1e-6 after 9 steps of AdamW."""
    torch.testing.assert_close(end(out)["metrics"], end(want)["metrics"], rtol=1e-9, atol=1e-12)
    a, b = (load_file(Path(folder) / "adapter.safetensors") for folder in (out, want))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"accumulate": 4}, {"fsdp": True}], ids=["parts", "two processes with shards"])
def test_a_divided_batch_equals_the_whole(how, photos, exact, tmp_path):
    settings = tiny(photos, tmp_path, **EXACT, **how)
    train_in_two_processes(settings) if settings.fsdp else train(settings, progress=False)
    assert_close_runs(tmp_path, exact)


@pytest.mark.slow
def test_two_processes_of_a_launcher_equal_one(photos, exact, tmp_path):
    launcher = "-m torch.distributed.run --nproc-per-node=2 --master-port=0 --rdzv-backend=c10d".split()
    run = [COMMAND[0], *launcher, "--rdzv-endpoint=localhost:0", *COMMAND[1:], "--data", photos, "--out", tmp_path]
    run += [*FLAGS, *"--dtype float64 --drop_path 0 --factor_dropout 0 --epochs 3 --workers 0".split()]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close_runs(tmp_path, exact)


def test_a_short_run_is_saved_after_each_epoch(photos, tmp_path, caplog):
    """By default. One that was killed before its first state says that it starts over."""
    caplog.set_level("INFO")
    for number, there in ((2, [3, 6]), (1, [])):  # killed after the second state, and before the first
        settings = tiny(photos, tmp_path / str(number), epochs=3, save_every=None)
        start(settings, _die_in("replace", number)).join()
        assert [int(path.stem[6:]) for path in checkpoints.states(tmp_path / str(number))] == there
        train(settings, progress=False)
        restarted = "has logs of an earlier run, but no state to continue from: starting at step 0" in caplog.text
        assert restarted == (not there)
    assert end(tmp_path / "1") == end(tmp_path / "2")


@pytest.mark.slow
def test_a_caller_may_end_a_run_after_an_epoch(photos, whole, tmp_path):
    after = Mock(side_effect=[None, LookupError("enough")])
    refuses(LookupError, "enough", train, tiny(photos, tmp_path), progress=False, after_epoch=after)
    entries = [call.args[0] for call in after.call_args_list]
    assert [entry["epoch"] for entry in entries] == [1, 2] and "top1" in entries[1]["val"]
    train(tiny(photos, tmp_path), progress=False)
    assert end(tmp_path) == whole, "it is continued as if it had not been ended"


@pytest.mark.parametrize("how", [{}, {"fsdp": False}, {"fsdp": True}], ids=["one process", "two", "two with shards"])
def test_the_best_epoch_on_val_is_what_counts(how, photos, tmp_path, monkeypatch):
    original, tops = loop.evaluate, itertools.chain([10.0, 90.0, 20.0, 90.0], itertools.repeat(100.0))
    monkeypatch.setattr(loop, "evaluate", lambda *args: original(*args) | {"top1": next(tops)})
    settings = tiny(photos, tmp_path, select="val", epochs=4, lr=1e-2, **how)
    if how:
        train_in_two_processes(settings)  # whose result is read by what follows
    result = train(settings, progress=False)
    assert result.epoch == 2
    losses = [entry["val"]["loss"] for entry in result.history]
    assert len(set(losses)) == 4 and result.metrics["val"]["loss"] == losses[1]
    assert all("test" not in entry for entry in result.history)


def test_val_of_lists_is_trained_on_or_held_out_to_choose_by(tmp_path):
    root = lists(tmp_path, n=6)
    for select, parts in (("last", {"test"}), ("val", {"val", "test"})):
        settings = tiny(root, tmp_path / select, epochs=2, batch_size=6, select=select)
        result = train(settings, progress=False)
        assert set(result.metrics) == parts and result.head_parameters == 65 * 100
    settings = tiny(root, tmp_path / "other", batch_size=7, select="val")
    refuses(ValueError, "at most the 6 training images", train, settings, progress=False)


def test_yaml_is_the_same_as_flags(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: photos\nout: runs/a\nrank: [4, 6]\nlr: 0.003\n"
        "targets: [attn]\nselect: val\nmethod: efft2\nblocks: [0, 2]\n"
    )
    flags = "--data photos --out runs/a --rank [4,6] --lr 3e-3 --targets [attn] --select=val --blocks [0,2]".split()
    assert cli.settings(["--config", str(path)]) == cli.settings(flags)
    assert cli.settings(["--config", str(path), "--lr", "1"]).lr == 1
    assert cli.settings(flags).rank == (4, 6) and cli.settings(flags).options["targets"] == ("attn",)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lerning_rate", "1"], "--lerning_rate"),
        (["--method", "lara"], "method must be one of full, linear"),
        (["--method", "linear", "--rank", "4"], "rank is not an option of method 'linear'"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "0"], "epochs must be an int of at least 1, got 0"),
        (["--lr", "-1"], "lr must be a finite number"),
        (["--lr", "nan"], "lr must be a finite number, got nan"),
        (["--min_lr", "2"], "min_lr must be at most lr=0.003, got 2"),
        (["--warmup_lr", "2"], "warmup_lr must be at most lr=0.003, got 2"),
        (["--classes", "1000000000"], "classes must be at most 1,000,000, got 1000000000"),
        (["--select", "test"], "select must be 'last' or 'val', got test"),
        (["--init", "foo"], "init must be 'xavier', 'released' or null, got foo"),
        (["--targets", "attn"], "targets must be a list such as '[a,b]' or null, got attn"),
        (["evaluate", "RUN"], "the commands are report, predict, export, compare"),
        ("--batch_size 100 --warmup_lr 2 --warmup_epochs 0".split(), "at most the 24 training images"),
        (["--accumulate", "3"], "batch_size must be a multiple of accumulate=3, got 8"),
        (["--cuda_graph", "true", "--accumulate", "2"], "accumulate must be 1 with cuda_graph=True, got 2"),
        (["--cuda_graph", "true"], "cuda_graph must be False unless one process trains on a CUDA GPU"),
        (["--warmup_epochs", "7"], "warmup_epochs must be at most the 6 epochs, got 7"),
        (["--model", "vit_base_patch16_225"], "near it are vit_base_patch16_224"),
        (["--model", "swin_tinyy"], "near it are swin_tiny_patch4_window7_224"),
        (["--model", "hf:nowhere/at-all"], "hf:nowhere/at-all"),
        (["--checkpoint", "none.pth"], "there is no checkpoint none.pth"),
        (["--checkpoint", "/"], "checkpoint must be a file of weights, got /, a folder"),
        (["--checkpoint", __file__], "is not a file of weights: it may hold more than tensors\n"),
        (["--checkpoint", "null"], "checkpoint must name the pre-trained weights"),
        (["--data", "nowhere"], "data must be a folder"),
        (["--rank", "65"], "rank must be at most 64"),
        (["--image_size", "33"], "33"),
        (["--dtype", "float64", "--mixed_precision", "bf16"], "mixed_precision must be 'no' with dtype='float64'"),
        (["--device", "xpu"], "device must be one of auto, cpu"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--ema", "1.0"], "ema must be a number in"),
        (["--patience", "3"], "patience must be None unless select is 'val'"),
        (["--trackers", "[nothing]"], "trackers must be among"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_settings_end_with_2_and_a_sentence(flags, words, photos, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        code = cli.main(["--data", str(photos), "--out", str(out), *FLAGS, *flags])
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == cli.WRONG and words in said and "Traceback" not in said, said
    late = flags[0] in ("--batch_size", "--model", "--checkpoint", "--data", "--rank", "--image_size")
    assert not (out / "logs").exists() and not checkpoints.states(out) if late else not out.exists()


def test_another_run_is_not_overwritten(photos, tmp_path, monkeypatch):
    settings = tiny(photos, tmp_path / "out", epochs=2)
    first = train(settings, progress=False)
    assert train(replace(settings, save_every=7), progress=False).metrics == first.metrics  # read, not trained again
    other = replace(settings, lr=0.1, weight_decay=0.0, drop_path=0.0, label_smoothing=0.1, augment="none", min_lr=1)
    said = r"differs in lr \(0.003 there, 0.1 now\), weight_decay .*, drop_path .*, label_smoothing .*, augment "
    refuses(ValueError, said, train, other, progress=False)
    other = folder(tmp_path / "other", ("train", "val", "test"), ("a", "b", "c"), n=9)
    refuses(ValueError, "differs in the images", train, replace(settings, data=str(other)), progress=False)
    for wrong in ({"data": str(tmp_path / "none")}, {"checkpoint": "none.pth"}):
        with pytest.raises((ValueError, FileNotFoundError), match="none"):
            train(replace(settings, resume=False, **wrong), progress=False)
        assert (first.out / "metrics.json").is_file()  # nothing is removed before a run can start
    logs = tmp_path / "out/logs"
    before = {path.name for path in logs.iterdir()}
    (logs / "of another program").mkdir()
    (logs / "of another program/events.out.tfevents.1").touch()
    for name, own in (("data", "predictions.csv"), ("checkpoint", "adapter.safetensors")):
        says, wrong = f"{name} must not lead to a file that is read and written, but .*/{own}", {name: first.out / own}
        refuses(ValueError, says, train, replace(settings, **wrong), progress=False)
    over = replace(settings, resume=False)
    at_call(Path, "unlink", 2, lambda *_, **__: 1 / 0, put=monkeypatch.setattr)  # a removal that is killed
    refuses(ZeroDivisionError, "zero", loop._remove_run, first.out)
    monkeypatch.undo()
    assert (first.out / "adapter.safetensors").exists() and not (first.out / "metrics.json").exists()
    refuses(ZeroDivisionError, "zero", train, over, progress=False, after_epoch=lambda entry: 1 / 0)
    assert {path.suffix for path in first.out.iterdir()} == {"", ".pt"}  # no result of the former run beside new states
    again = train(replace(over, lr=0.1), progress=False)
    assert again.metrics["test"]["loss"] != first.metrics["test"]["loss"]
    after = {path.name for path in logs.iterdir()} - {"of another program"}
    assert len(before) == len(after) == 1 and before != after and [*logs.glob("*/events.out.tfevents.1")]
    with checkpoints.alone(tmp_path / "out"), pytest.raises(ValueError, match="another process"):
        train(settings, progress=False)


def test_an_image_that_is_damaged_later(photos, tmp_path, monkeypatch):
    """A worker process finds it in the middle of an epoch; the error is one line."""
    root = folder(tmp_path / "photos", ("train", "test"))
    settings = tiny(root, tmp_path / "out", workers=1, batch_size=4)
    damage = lambda *_, **__: (root / "train/cat/3.png").write_bytes(b"")
    at_call(prepared, "read_images", 1, damage, after=True, put=monkeypatch.setattr)
    with pytest.raises(ValueError) as error:
        train(settings, progress=False)
    assert "cat/3.png cannot be read" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["full", "linear", "vpt-deep", "adapter", "efft2"])
def test_predict_and_merge_give_the_model_of_the_run(method, photos, tmp_path, capsys):
    options = {"rank": 4} if method == "efft2" else {"rank": None}
    result = train(tiny(photos, tmp_path / "out", method=method, epochs=2, lr=1e-2, **options), progress=False)
    files = [str(path) for path in sorted((photos / "test").rglob("*.png"))]
    assert cli.main(["predict", str(result.out), *files]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    right = sum(Path(file).parent.name == label for file, label, _ in rows)
    assert 100 * right / len(files) == pytest.approx(result.metrics["test"]["top1"], abs=1e-3)
    target = tmp_path / "merged.safetensors"
    code = cli.main(["export", str(result.out), "--to", "weights", "--out", str(target)])
    if method in ("vpt-deep", "adapter"):
        assert code == cli.WRONG and "cannot be folded" in capsys.readouterr().err
        return
    assert code == 0
    plain = timm().create_model("test_vit", num_classes=3, img_size=32)
    plain.load_state_dict(load_file(target))
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), restore(result.out)[0](x), rtol=1e-4, atol=1e-5)


def test_learning_rate_warms_up_and_falls_as_a_cosine(whole):
    found = [entry["lr"] for entry in whole["history"]]
    steps = [3 * epoch - 1 for epoch in range(1, 7)]  # the last of each epoch; 0.6 epochs of warm-up are 2 of 18 steps
    assert found == pytest.approx([1e-5 + (3e-3 - 1e-5) * (1 + math.cos(math.pi * t / 18)) / 2 for t in steps])


@pytest.mark.slow
def test_the_recipe_reaches_what_it_is_for(photos, tmp_path, monkeypatch):
    seen, rates = {}, []
    for owner, name in (torch.optim, "AdamW"), (prepared, "make_model"), (evaluation.F, "cross_entropy"):
        seen[name] = Mock(wraps=getattr(owner, name))
        monkeypatch.setattr(owner, name, seen[name])
    original = loop.one_step

    def step(run, progress, *rest):
        rates.append(progress.optimizer.param_groups[0]["lr"])
        assert progress.sums[2] == 8 * (progress.step % 3)  # images of this epoch
        original(run, progress, *rest)

    monkeypatch.setattr(loop, "one_step", step)
    recipe = dict(weight_decay=0.07, drop_path=0.3, label_smoothing=0.2, warmup_epochs=1, warmup_lr=1e-4, epochs=2)
    train(tiny(photos, tmp_path, **recipe), progress=False)
    adam, made, loss = (spy.call_args_list[0] for spy in seen.values())
    assert (adam.kwargs["lr"], adam.kwargs["weight_decay"]) == (3e-3, 0.07)
    assert made.args[-1] == 0.3 and loss.kwargs["label_smoothing"] == 0.2
    assert rates[:3] == pytest.approx([1e-4 + (3e-3 - 1e-4) * t / 3 for t in range(3)])  # three steps of warm-up


def test_accuracy_over_classes_is_of_those_that_have_images(tmp_path):
    """A class without test images does not count, even if images of other classes are taken for it."""
    root = folder(tmp_path / "photos", ("train",), ("a", "b", "c"), n=8)
    folder(root, ("test",), ("a", "b"), n=9)
    result = train(tiny(root, tmp_path / "out", epochs=1), progress=False)
    files = sorted(str(path) for path in (root / "test").rglob("*.png"))
    right = [Path(found.file).parent.name == found.classes[0] for found in label(result.out, files)]
    found = result.metrics["test"]
    assert found["top1"] == pytest.approx(100 * np.mean(right), abs=1e-3)
    assert found["mean_class"] == pytest.approx(100 * np.mean([np.mean(right[:9]), np.mean(right[9:])]), abs=1e-3)


def test_a_state_that_diverged_replaces_none(photos, tmp_path, monkeypatch):
    diverge = lambda run, progress, *_: progress.sums[0].fill_(torch.nan)
    at_call(loop, "one_step", 5, diverge, after=True, put=monkeypatch.setattr)
    with pytest.raises(ValueError, match="the loss of step 5 is nan; a smaller lr"):
        train(tiny(photos, tmp_path, save_every=1), progress=False)
    assert [path.name for path in checkpoints.states(tmp_path)] == ["state-000000003.pt", "state-000000004.pt"]


def test_what_is_printed_at_the_end_can_be_pasted(photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a run"
    monkeypatch.setattr(loop, "train", lambda settings: loop.Result({}, [], 0, 0, 0.0, 1, out / "adapter", out))
    assert cli.main(["--data", str(photos), "--out", str(out), *FLAGS]) == 0
    assert f"predict '{out}' IMAGE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, code, words",
    [
        (KeyboardInterrupt(), cli.INTERRUPTED, "the same command continues"),
        (PermissionError(errno.EACCES, "Permission denied", "secret/0.png"), cli.WRONG, "secret/0.png"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), cli.WRONG, "larger accumulate"),
    ],
)
def test_what_happens_before_the_first_step_is_a_sentence(error, code, words, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared, "read_images", Mock(side_effect=error))
    assert cli.main(["--data", str(photos), "--out", str(tmp_path), *FLAGS]) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("efft-finetune: ") and words in said


def test_weights_that_have_moved(photos, tmp_path):
    for name in ("a.pth", "c.pth"):
        torch.save(timm().create_model("test_vit").state_dict(), tmp_path / name)
    settings = tiny(photos, tmp_path / "out", checkpoint=str(tmp_path / "a.pth"), epochs=1)
    out = train(settings, progress=False).out
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    refuses(FileNotFoundError, "no checkpoint .*a.pth; if it has moved, set checkpoint to its new", restore, out)
    model, _ = restore(out, str(tmp_path / "b.pth"))
    save_adapter(model, tmp_path / "c", head=True, classes=["c", "b", "a"])
    shutil.copytree(out, tmp_path / "other")
    (tmp_path / "c").rename(tmp_path / "other/adapter.safetensors")
    refuses(ValueError, "but it states another classes", restore, tmp_path / "other", str(tmp_path / "b.pth"))
    says = "checkpoint must be the weights that the run in .* started from"
    refuses(ValueError, says, restore, out, str(tmp_path / "c.pth"))
    assert train(replace(settings, checkpoint=str(tmp_path / "b.pth")), progress=False).out == out
    other = replace(settings, checkpoint=str(tmp_path / "c.pth"))
    refuses(ValueError, "differs in the frozen weights", train, other, progress=False)


def test_training_images_are_measured_without_augmentation(tmp_path):
    root = folder(tmp_path / "photos", classes=("a", "b"), n=12)
    result = train(tiny(root, tmp_path / "out", epochs=2, augment="rand", test_fraction=0.0), progress=False)
    found = label(result.out, [*map(str, root.rglob("*.png"))])
    right = [Path(each.file).parent.name == each.classes[0] for each in found]
    assert result.metrics["train"]["top1"] == pytest.approx(100 * np.mean(right), abs=1e-3)


def test_out_is_a_folder_of_a_run_or_none(photos, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for name, out, says in [
        ("out", "out", "out must be a folder, but .*out cannot be one: File exists"),
        ("out", "out/run", "out must be a folder, but .*run cannot be one: Not a directory"),
        ("out", "link", "out must be a folder, but .*link cannot be one: File exists"),
        ("a/predictions.csv", "a", "out must be an empty folder or that of a run, but .*a holds predictions.csv of no"),
        ("b/metrics.json", "b", "but .*b holds metrics.json of no run: .* it lacks classes"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        for resume in (True, False):
            refuses(ValueError, says, train, tiny(photos, tmp_path / out, resume=resume), progress=False)
        assert (tmp_path / name).read_text() == "{}"
    (tmp_path / name).write_text('{"settings": {}, "result": {}}')  # of another version
    says = "of no run that this version can read: .*; remove these files, or set resume=false"
    refuses(ValueError, says, outputs.check_folder, tmp_path / "b")
    outputs.check_folder(tmp_path / "b", resume=False)


def test_help_names_what_there_is(capsys):
    refuses(SystemExit, "2", cli.main, ["--data", "a", "--out", "b", "--rank", "3.5"])
    assert "error: rank must be an int, a pair such as '[1,2]' or null, got 3.5\n" in capsys.readouterr().err
    refuses(SystemExit, "0", cli.main, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for word in (*METHODS, "torchrun", "predict OUT", "export OUT", "--batch_size", "factor_dropout 0.1"):
        assert word in said, word


def test_model_of_transformers_from_a_folder(photos, tmp_path):
    """Train with bf16 and accumulation, restore, and merge into a file that transformers loads."""
    base = vit_of_transformers(num_labels=7)
    base.save_pretrained(tmp_path / "base")
    changes = dict(model=f"hf:{tmp_path / 'base'}", checkpoint=None, mixed_precision="bf16", accumulate=2, epochs=2)
    settings = tiny(photos, tmp_path / "out", **changes)
    result = train(settings, progress=False)
    train(replace(settings, out=str(tmp_path / "again")), progress=False)
    assert end(result.out) == end(tmp_path / "again")
    assert read_adapter(result.out / "adapter.safetensors").base_model == "hf:base"
    moved = str((tmp_path / "base").rename(tmp_path / "moved"))
    refuses(FileNotFoundError, "there is no folder .*; if it has moved, set checkpoint to its new", restore, result.out)
    model, _ = restore(result.out, moved)
    merged(result.out, f"{moved}/model.safetensors", moved)
    refuses(ValueError, "checkpoint must be the weights that .* got others in '.*/moved'", restore, result.out, moved)
    plain, x = type(base).from_pretrained(moved, num_labels=3).eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)


def test_a_weight_without_effect_is_left_alone(photos, tmp_path, monkeypatch):
    def make(*args):
        model = make_model(*args)
        model.mask_token = torch.nn.Parameter(torch.ones(3))
        return model

    monkeypatch.setattr(prepared, "make_model", make)
    monkeypatch.setattr(finished, "make_model", make)
    settings = tiny(photos, tmp_path, method="full", rank=None, epochs=1)
    train(settings, progress=False)
    assert torch.equal(finished.restore(tmp_path)[0].mask_token, torch.ones(3))


@pytest.mark.slow
def test_learns(tmp_path):
    """Dark and light images: every test image is classified correctly in the end."""
    for part, n in (("train", 16), ("test", 8)):
        for name, low in (("dark", 0), ("light", 160)):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(i).integers(low, low + 95, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.png")
    result = train(tiny(tmp_path / "data", tmp_path / "out", epochs=8, lr=1e-2), progress=False)
    assert result.metrics["test"]["top1"] == 100.0
    assert result.history[-1]["train"]["loss"] < 0.7 * result.history[0]["train"]["loss"]
    assert list((tmp_path / "out" / "logs").iterdir())
