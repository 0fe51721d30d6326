"""Settings of the service as pydantic models: Ray's application builder and the command validate their input with them.

The docstring below each field is its description in ``python -m efft_kernels.serving --help``.
"""

import os
from typing import Annotated, Literal

try:
    from pydantic import AfterValidator, BaseModel, ConfigDict, Field
except ImportError as error:
    raise ImportError("the service needs pydantic: pip install 'efft_kernels[serve]'", name="pydantic") from error

from ..hub import is_on_hub

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
# absolute, because a replica has its own working directory
FilePath = Annotated[str, AfterValidator(lambda path: os.path.abspath(path) if path else "")]


class _Checked(BaseModel):
    """A model that refuses unknown names and is immutable. Numbers may be given as text, as Ray's command line does."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class Settings(_Checked):
    """What the application serves, and within which limits.

    Raises:
        pydantic.ValidationError: a ValueError; a setting is unknown, missing, of another type or out of range. The
            message names each such setting, what was expected and what came.
    """

    model: str
    """name of a timm model"""
    adapters: Annotated[str, AfterValidator(lambda path: path if is_on_hub(path) else os.path.abspath(path))]
    """folder with adapter files, or hf-hub:OWNER/NAME for those of a repository; NAME.safetensors is served as adapter
    NAME"""
    weights: FilePath = ""
    """checkpoint file of the model; empty for random weights, to try the service out"""
    num_classes: Annotated[int, Field(ge=0)] = 0
    """number of classes in the checkpoint; 0 for the model's default in timm"""
    image_size: Annotated[int, Field(ge=0)] = 0
    """side in pixels of the images that the model takes; 0 for the model's default in timm. Adapters that were trained
    on images of another size are refused"""
    labels: FilePath = ""
    """file with the names of the model's own classes, one per line; those of an adapter are in its file, or in
    NAME.labels.txt next to it"""
    key_file: FilePath = ""
    """file with API keys, one per line, of which a request must bring one, as Authorization: Bearer KEY; empty for no
    keys"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """data type the model computes in"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the model computes; CUDA_VISIBLE_DEVICES says which GPUs there are for the replicas, one for each"""
    backend: str = ""
    """a name from efft_kernels.backends(); empty for the fastest proven one"""
    replicas: Count = 1
    """number of processes, each with its own copy of the model"""
    threads: Count = 1
    """compute threads of each replica, and CPUs of the cluster reserved for it"""

    max_batch: Count = 16
    """images in one forward of the model"""
    batch_wait_ms: NonNegative = 5.0
    """milliseconds that an image waits for others to share its forward"""
    adapter_bytes: Count = 2**30
    """memory budget for adapters in each replica; the least recently used are evicted"""
    max_bytes: Count = 20 * 2**20
    """size limit of an image file, with the video that a phone appends to it"""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 25_000_000
    """limit of width times height of an image, at most that of Pillow"""
    max_ongoing: Count = 32
    """requests that one replica works on at a time; further ones wait"""
    max_queued: Count = 128
    """requests that may wait, shared by the replicas; further ones are answered with 503"""
    max_uploads: Count = 64
    """room for images that are arriving at one replica, apart from those: their bytes are at most this many times
    max_bytes, and then the oldest is dropped for the next"""
    upload_s: Annotated[float, Field(gt=0)] = 30.0
    """seconds within which an image must arrive"""
    stop_s: NonNegative = 20.0
    """seconds that a stopping replica has to answer the requests it has accepted"""


class ServerSettings(_Checked):
    """Where the service listens, and the Ray that runs it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,39})$")] = "efft"
    """name of the service on a cluster. efft is served at /, any other NAME at /NAME"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for all"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """port to listen on"""
    address: str = ""
    """address of a running Ray cluster, auto for the one on this machine; empty to start a Ray of its own"""
    insecure: bool = False
    """serve although Ray asks for no token: whoever reaches its ports can run code on the cluster"""
    replace: bool = False
    """take the place of a service of this name on the cluster whose command has ended"""
    object_store_bytes: Count = 100 * 2**20
    """shared memory of a Ray that is started here; the service puts nothing large into it"""
    timeout_s: NonNegative = 60.0
    """seconds after which a request is answered with 408"""
    start_s: Annotated[float, Field(gt=0)] = 600.0
    """seconds after which a start is given up"""
    drain_s: NonNegative = 5.0
    """seconds for which a stopping service answers new requests and health checks with 503 at least, so that a load
    balancer sends them elsewhere"""

    @property
    def prefix(self) -> str:
        """Path of the service."""
        return "/" if self.name == "efft" else f"/{self.name}"
