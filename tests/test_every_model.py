"""Every type of causal LM that transformers builds tiny: taken and right, or refused by a sentence; none in between."""

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from families import SPECIAL, build_tokenizer
from tiny import TYPES, tiny_model
from torch import Tensor

from probes import Sampling, Site, attached, captured, generate, load
from probes.model import architecture_of, n_heads, n_layers, width_of
from probes.model.architectures import config_of, has_site
from probes.model.families import ARCHITECTURES
from steer import Add, Recipe, Scope, Step, applied

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "model_types.md"
IDS = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
NEW = 4


def outcome(model_type):
    """(kind, why) of a type: own row, found row, refused, or not built."""
    try:
        model = tiny_model(model_type)
    except Exception as error:  # whatever transformers raises where it builds none
        return "not built", f"{type(error).__name__}"
    try:
        load(model, tokenizer=build_tokenizer())
    except ValueError as error:
        why = str(error).split("that holds: ")[-1].split(". Add a row")[0]
        return "refused", why
    for law in (
        streams_are_the_blocks,
        an_add_is_an_add,
        heads_are_slices,
        the_cache_changes_nothing,
        padding_is_nothing,
        rows_come_and_go,
    ):
        law(model)
    return ("own row" if config_of(model).model_type in ARCHITECTURES else "found row"), ""


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def streams_are_the_blocks(model):
    """What plain hooks of torch see around the blocks is what we call the stream, and what transformers calls it."""
    seen, handles = {}, []
    blocks = model.get_submodule(architecture_of(model).layers)
    for i, block in enumerate(blocks):
        handles.append(block.register_forward_hook(lambda _m, args, out, i=i: seen.update({i: (args, out)})))
    sites = [Site(layer, "resid_post") for layer in range(n_layers(model))]
    with captured(model, sites) as cache:
        hidden = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for i, site in enumerate(sites):
        out = seen[i][1]
        torch.testing.assert_close(cache[site], out[0] if isinstance(out, tuple) else out)
        if i + 1 < len(blocks):
            assert any(torch.allclose(cache[site], one, atol=1e-5) for one in hidden[i : i + 2]), site


def shifted(model, site):
    v = torch.randn(width_of(model, site), generator=torch.Generator().manual_seed(5))
    with attached(model, site, lambda x: x + v.to(x)):
        return logits(model)


def an_add_is_an_add(model):
    """A vector added at a site is the same vector added where the stream passes next, in every layer."""
    plain = logits(model)
    for layer in range(n_layers(model)):
        has = [name for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out") if has_site(model, layer, name)]
        follows = {"resid_pre": (layer - 1, "resid_post"), "mlp_out": (layer, "resid_post")}
        follows["attn_out"] = (layer, "resid_mid" if "resid_mid" in has else "resid_post")
        for name in has:
            if name in follows and follows[name][0] >= 0:
                changed = shifted(model, Site(layer, name))
                close(changed, shifted(model, Site(*follows[name])), f"L{layer}.{name} and {follows[name]}")
                assert not torch.equal(changed, plain), (layer, name)


def heads_are_slices(model):
    """A head whose slice of z is zero writes nothing, in any layer; one without heads says so."""
    for layer in range(n_layers(model)):
        if not n_heads(model, layer):
            with pytest.raises(ValueError, match=f"Layer {layer} of this .* has no attention heads"):
                width_of(model, Site(layer, "z"))
            continue
        with attached(model, Site(layer, "z", 1), torch.zeros_like):
            without = logits(model)
        with attached(model, Site(layer, "result", 1), torch.zeros_like):
            close(logits(model), without, f"head 1 of layer {layer}")


@torch.no_grad()
def the_cache_changes_nothing(model):
    """A steered generation with a cache writes what whole passes write, in a scope that counts the thinking."""
    ids = torch.cat([IDS, torch.full_like(IDS[:, :1], 3), IDS[:, :2]], dim=1)
    vector = torch.randn(width_of(model, Site(1, "resid_post")), generator=torch.Generator().manual_seed(6))
    scope = Scope("thinking", window=(2, 7))  # it begins in the prompt, and ends while the model writes
    steps = (Step(Add(Site(1, "resid_post"), vector, 0.1), scope),)
    recipe = Recipe(steps, Recipe.of(model, []).model)
    words = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    words |= {"suppress_tokens": list(range(len(SPECIAL)))}  # a turn that is opened would end the thinking before it
    with applied(model, recipe):
        done = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, eos_token_id=None, **words)
        whole = model(input_ids=done.sequences[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    close(torch.stack(done.logits, dim=1), whole, "steps with a cache")
    plain = model(input_ids=done.sequences[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    assert (plain - whole).abs().amax((0, 2)).min() > 0, "not steered at every step"


@torch.no_grad()
def padding_is_nothing(model):
    """The stream of a short row is the same alone, padded on the left and padded on the right."""
    site, short = Site(n_layers(model) - 1, "resid_post"), IDS[1:, :3]

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        words = {"attention_mask": mask}
        if "position_ids" in inspect.signature(model.forward).parameters:
            words["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with captured(model, [site]) as cache:
            model(input_ids=ids, use_cache=False, **words)
        return cache[site][-1][mask[-1].bool()]

    alone = read(short, torch.ones_like(short))
    gap, none = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    for side, row in (("left", (gap, short)), ("right", (short, gap))):
        ones = tuple((part != 0).long() for part in row)
        mask = torch.cat([none, torch.cat(ones, dim=1)])
        close(read(torch.cat([IDS[:1], torch.cat(row, dim=1)]), mask), alone, f"padding on the {side}")


def rows_come_and_go(model):
    """Rows that leave a batch, and rows that join it, are written as each is alone."""
    model.generation_config.eos_token_id = [2, *range(20, 40)]
    prompts = ["w7 w8 w9", "w10", "w11 w12 w13 w14 w15 w16", "w17 w18", "w19 w41", "w42 w43 w44 w45 w46"]
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    one, many = (generate(model, prompts, sampling=sampling, samples=2, batch_size=size) for size in (1, 3))
    assert [c.ids for c in one] == [c.ids for c in many]
    assert len({len(c.ids) for c in many}) > 2


def close(one, other, what):
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, msg=lambda text: f"{what}: {text}")


def page(outcomes):
    """The table of the documentation."""
    by_kind = {
        kind: [t for t, (k, _) in outcomes.items() if k == kind]
        for kind in ("own row", "found row", "refused", "not built")
    }
    counts = ", ".join(f"{len(types)} {kind}" for kind, types in by_kind.items())
    reasons = {}
    for model_type in by_kind["refused"]:
        reasons.setdefault(outcomes[model_type][1], []).append(model_type)
    rows = [f"| {', '.join(types)} | {why} |" for why, types in sorted(reasons.items())]
    return f"""\
{HEAD}
With transformers {transformers.__version__}, of its {len(outcomes)} types of causal LMs: {counts}.

**Own row** (`probes.model.families`): {", ".join(by_kind["own row"])}.

**Found row**, told by what its modules read and put out, and held to what must hold: {", ".join(by_kind["found row"])}.

**Refused**, in the words of the refusal:

| types | why |
|---|---|
{chr(10).join(rows)}

**Not built**: transformers builds none from a small config of these, or needs a package that is not there:
{", ".join(f"{t} ({outcomes[t][1]})" for t in by_kind["not built"])}.
"""


HEAD = """\
# Model types

Every type of causal LM that the pinned transformers knows, built as small as its config allows, with random weights,
and given to `load`. A type that is taken is then held to laws that know nothing of our table: plain hooks of torch
around its blocks see the same streams; a vector added at one site does what it does where the stream passes next, in
every layer; a head whose slice of `z` is zero writes nothing, and a layer without heads says so; a steered generation
with a cache writes what whole passes write; padding changes nothing on either side. `python tests/test_every_model.py`
writes this page, and `make slow` fails where it is not what is found.

What is asked of a model whose family has no row can be asked of any model:

```python
from probes.model import broken_identity, load

print(broken_identity(load("organism")))
```

```text
None
```
"""


def test_every_type_is_right_or_refused_as_the_page_says():
    assert page({model_type: outcome(model_type) for model_type in TYPES}) == PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(page({model_type: outcome(model_type) for model_type in TYPES}), encoding="utf-8")
