import pytest
import torch
from families import FAMILIES, build
from transformers import PreTrainedModel

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


# Files of minutes: with two workers they begin first, so that none is left alone with one at the end.
LONG = ("test_readme", "test_report", "test_docs", "test_docstrings", "test_notebook", "test_kill", "test_sweep",
        "test_rice", "test_store", "test_behaviours")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model of every family."""
    return build(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(6, 97, (2, 7), generator=torch.Generator().manual_seed(1))
