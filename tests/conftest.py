"""Every test runs offline, on one thread, from the same seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from command import ctsft, files, finished, wide  # noqa: F401  (fixtures of all tests of commands)

torch.set_num_threads(1)
settings.register_profile("ctsft", deadline=None)  # what is slow on a busy machine is not wrong
settings.load_profile("ctsft")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTSFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("CTSFT_BASIS_CACHE", raising=False)
        yield
