import pytest
import torch
from families import FAMILIES, build
from transformers import PreTrainedModel

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One model of every family."""
    return build(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(6, 97, (2, 7), generator=torch.Generator().manual_seed(1))
