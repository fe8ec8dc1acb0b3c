"""lm-eval's own steered model, given our file, has our logits. It needs lm-eval, which is no dependency: `peers`."""

import pytest
import torch

from probes.model.loading import ORGANISM, load
from probes.model.sites import Site
from steer.interop.formats import export_recipe, import_recipe
from steer.interventions.activation import Ablate, Add
from steer.recipes.recipe import Recipe
from steer.runtime._applied import applied

pytestmark = pytest.mark.peers
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm_eval")
TOKENS = torch.tensor([[1, 6, 17, 7, 27, 60, 5, 3, 56], [1, 6, 20, 8, 43, 7, 5, 3, 59]])


def vector(seed):
    return torch.randn(96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "steps",
    [
        [Add(Site(2, "resid_post"), vector(1), 1.5), Add(Site(0, "resid_post"), vector(2))],
        [Add(Site(1, "resid_post"), vector(1)), Add(Site(1, "resid_post"), vector(2), -0.5)],
        [Ablate(Site(1, "resid_post"), vector(3), target=2.0)],
        [Add(Site(1, "attn_out"), vector(4)), Ablate(Site(2, "mlp_out"), vector(5))],
    ],
    ids=["layers", "summed", "clamp", "modules"],
)
def test_the_steered_model_has_our_logits(steps, tmp_path):
    from lm_eval.models.hf_steered import SteeredModel

    model = load("organism", dtype=torch.float32)
    recipe = Recipe.of(model, steps)
    export_recipe(recipe, tmp_path / "v.pt", "lm-eval")
    theirs = SteeredModel(str(ORGANISM), str(tmp_path / "v.pt"), device="cpu", dtype="float32")
    with torch.no_grad():
        steered = theirs._model_call(TOKENS)
        plain = model(TOKENS).logits
        for ours in (recipe, import_recipe(tmp_path / "v.pt", model)):
            with applied(model, ours):
                torch.testing.assert_close(model(TOKENS).logits, steered, atol=1e-5, rtol=0)
    assert (steered - plain).abs().max() > 0.1
