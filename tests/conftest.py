"""Set-up of all tests: Triton's interpreter if there is no GPU, one thread, a fixed seed, the device to test on."""

import os

import pytest
import torch

# set before the kernels are imported: without a GPU the interpreter runs them on CPU tensors
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# The tests' tensors are too small for a second thread to help, here and in the processes that tests start: on a busy
# machine two threads that wait for each other take many times the processor time of one.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# some names of tests hold numbers that are drawn at collection, and every process must find the same names
torch.manual_seed(0)


# the files that take longest, longest first: processes that share the files (.ci/run) then end at about the same time
LONGEST = (
    "cuda finetune_run serving_cluster contract paper_vtab1k tuning serving_app model_compile bench_model "
    "paper_ablation bench_gpu serving_bank models_table paper_together scaling bench"
).split()


def pytest_collection_modifyitems(items):
    """Longest files first. What runs CUDA kernels is slow: the simulator takes half a minute to compile."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    for item in items:
        if item.path.name == "test_cuda.py" and {"device", "built"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _undrawn():
    """Saves figures without drawing them, which takes half of the time of a short run of efft-finetune."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo what it has patched itself
        patch.setattr(figure, "savefig", lambda self, file, **options: file.write(b"a figure"))
        yield


undrawn = pytest.fixture(_undrawn, name="undrawn")
undrawn_module = pytest.fixture(_undrawn, name="undrawn_module", scope="module")  # for fixtures of a module, too


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
