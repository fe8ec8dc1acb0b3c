"""Norms of a decode step are those of its activations as they were met, whatever is done to them afterwards."""

import pytest
import torch

from steer.runtime.noted import Noted


def met(seed, batch=3, width=8):
    x = torch.randn(batch, 1, width, generator=torch.Generator().manual_seed(seed))
    return x, 2 * x + 1


def expected(x, new):
    return torch.linalg.vector_norm(x, dim=-1).flatten(), torch.linalg.vector_norm(new - x, dim=-1).flatten()


def taken(noted):
    """By step."""
    return {
        step: (part.before[i], part.change.expand_as(part.before)[i])
        for part in noted.take()
        for i, step in enumerate(part.steps)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_kept_and_taken_together_is_what_is_taken_at_once(dtype):
    """Steps of two widths, one that adds a vector, over four passes, the first of which is taken at once."""
    noted = Noted([0, 0, 0, 0])
    for round_ in range(4):
        pairs = {
            step: tuple(x.to(dtype) for x in met(10 * round_ + step, width=8 + 4 * (step == 2))) for step in range(4)
        }
        for step, (x, new) in pairs.items():
            noted.note(step, x, 0.5 if step == 3 else new)
        found = taken(noted)
        assert sorted(found) == [0, 1, 2, 3]
        for step, (x, new) in pairs.items():
            before, change = expected(*(part.double() if dtype is torch.float64 else part.float() for part in (x, new)))
            torch.testing.assert_close(found[step][0], before)
            if step == 3:
                assert torch.equal(found[step][1], torch.full((3,), 0.5))
            else:
                torch.testing.assert_close(
                    found[step][1], change, rtol=1e-3 if dtype is torch.bfloat16 else 1e-6, atol=1e-3
                )
    assert noted.take() == []


def test_an_activation_that_the_model_writes_into_is_read_before():
    """Told in the first pass, and from then on."""
    noted = Noted([0])
    for round_ in range(3):
        x, new = met(round_)
        before, change = expected(x, new)
        noted.note(0, x, new)
        x.add_(100)
        new.mul_(3)
        found = taken(noted)
        torch.testing.assert_close(found[0], (before, change))


def test_one_that_is_written_into_later_than_in_the_first_pass_is_refused():
    noted = Noted([0])
    noted.note(0, *met(0))
    noted.take()
    x, new = met(1)
    noted.note(0, x, new)
    x.add_(1)
    with pytest.raises(RuntimeError, match="wrote into an activation"):
        noted.take()


def test_activations_without_a_counter_are_read_at_once():
    noted = Noted([0])
    with torch.inference_mode():
        x, new = met(0)
        before, change = expected(x, new)
        noted.note(0, x, new)
        noted.note(0, x, new)
        x.add_(1)
    torch.testing.assert_close(taken(noted)[0], (before, change))
