"""Set-up for every test: Triton's interpreter where there is no GPU, one thread, one seed, the name of this device."""

import os

import pytest
import torch

# before anything imports the kernels: without a GPU they run through the interpreter, on CPU tensors
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# the tensors of the tests are small: a second thread would only wait for the first
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
