"""Fixtures that every part shares: tiny random models, the packaged one, the real data."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from a2sf.model import dtypes
from a2sf.model.loader import LoadedModel, load_model
from a2sf.threads import CGROUP_LIMIT, granted
from scripts.real_model import DIRECTORY, CannotFetch, gguf_file, real_model
from tests.tiny import save_tiny_llama

settings.register_profile("default", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("default")

# Tiny tensors gain nothing from threads, and one thread adds up in the same order every time.
torch.set_num_threads(1)


WORKER_BYTES = 3 * 2**30
"""What a worker takes at the most, with the servers and the models that its tests start."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker for each granted core, as far as memory goes."""
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().available // WORKER_BYTES
    return max(1, min(cores, granted(CGROUP_LIMIT) or cores, memory))


@pytest.fixture(autouse=True)
def _ctrl_c_ends_the_tests() -> Iterator[None]:
    """Programs that run in the tests' own process handle SIGINT in their own way."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _auto_is_float32_on_any_processor() -> Iterator[None]:
    """Tests in this process find the same dtype on every machine, however fast it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtypes, "bfloat16_unit", lambda: (None, "tests take float32"))
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random GQA Llama (3 layers, 4 query and 2 KV heads of 8)."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> LoadedModel:
    """The tiny model in float32 on the processor."""
    return load_model(str(tiny_model_dir), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_model_64(tiny_model_dir: Path) -> LoadedModel:
    """The tiny model in float64, where near-ties cannot hide."""
    return load_model(str(tiny_model_dir), device="cpu", dtype="float64")


@pytest.fixture(scope="session")
def reference_model() -> LoadedModel:
    """The packaged model in float32 on the processor."""
    return load_model("reference", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """A small model that people use, made by `make real-model`; skips where it cannot be had."""
    DIRECTORY.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Workers that miss it at the same time fetch it once.
        with FileLock(DIRECTORY.parent / "making.lock"):
            return real_model()
    except CannotFetch as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_gguf(real_model_dir: Path) -> Path:
    """The GGUF file that it was made from."""
    return gguf_file(real_model_dir)


@pytest.fixture(scope="session")
def real_loaded(real_model_dir: Path) -> LoadedModel:
    """It, in float32 on the processor: 650 MB."""
    return load_model(str(real_model_dir), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real calibration data; tests that need it are skipped where it is not."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("A2SF_DATA_DIR", default))
    if not path.is_dir():
        pytest.skip(f"no data in {path}; set A2SF_DATA_DIR")
    return path
