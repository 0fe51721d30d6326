"""docs/scaling.md: runs of several machines, each of which is a process on loopback here."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import timm

timm()
pytest.importorskip("accelerate")
psutil = pytest.importorskip("psutil")
from test_finetune_data import folder

from efft_kernels.finetune import checkpoints

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--model test_vit --checkpoint random --image_size 32 --batch_size 8 --rank 4 --save_every 2 --device cpu".split()
)


@pytest.mark.slow
def test_a_killed_process_ends_a_run_of_two_agents_with_a_sentence(tmp_path):
    data, out = folder(tmp_path / "photos", ("train", "test"), ("a", "b"), n=8), tmp_path / "run"
    # torchrun with one process, once for each machine
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", endpoint]
    run += ["--rdzv-backend=c10d", "--rdzv-id=run", "--local-addr=127.0.0.1", "-m", "efft_kernels.finetune.cli"]
    run += ["--data", str(data), "--out", str(out), "--epochs", "500", *FLAGS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen(run, env=environment, **pipes) for _ in range(2)]
    try:
        end = time.monotonic() + 300
        while not checkpoints.states(out) and time.monotonic() < end and all(a.poll() is None for a in running):
            time.sleep(0.05)
        workers = [child for agent in running for child in psutil.Process(agent.pid).children()]
        victim = next(w for w in workers if w.environ()["RANK"] == "1")
        victim.send_signal(signal.SIGKILL)
        said = "".join(agent.communicate(timeout=120)[1] for agent in running)
    finally:
        for agent in running:
            agent.kill()
    assert all(agent.returncode for agent in running)
    (line,) = [line for line in said.splitlines() if "another process of this run" in line]
    assert line.startswith("efft-finetune: another process of this run has ended or cannot be reached (")
    step = int(checkpoints.states(out)[-1].stem[6:])
    assert line.endswith(f"the state of step {step} is complete and the same command continues from it")
