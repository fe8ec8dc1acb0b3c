import pytest
import torch
from families import FAMILIES, build

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(params=FAMILIES)
def model(request):
    """One model of every family."""
    return build(request.param)


@pytest.fixture
def tokens():
    return torch.randint(6, 97, (2, 7), generator=torch.Generator().manual_seed(1))
