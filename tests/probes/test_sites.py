import pytest
from families import build

from probes.model.architectures import path_of, site_of, tap_of
from probes.model.hooks import attached
from probes.model.sites import SITE_NAMES, Site


@pytest.mark.parametrize("text", ["L12.resid_post", "L12H7.z", "L0H0.result", "L3.mlp_in"])
def test_a_site_is_read_as_it_is_written(text):
    assert str(Site.parse(text)) == text


@pytest.mark.parametrize("name", SITE_NAMES)
def test_a_transformer_lens_name_is_accepted_and_given_back(name):
    site = Site(5, name)
    assert Site.parse(site.transformer_lens) == site


def test_a_hugging_face_path_is_accepted_and_given_back():
    model = build("gemma2")
    for name in ("resid_post", "attn_out", "mlp_out"):
        assert site_of(model, path_of(model, Site(2, name))) == Site(2, name)
    assert site_of(model, "L1.z") == Site(1, "z")
    with pytest.raises(ValueError, match="'model.layers.1.self_attn' is not a site.*post_attention_layernorm"):
        site_of(model, "model.layers.1.self_attn")


@pytest.mark.parametrize("text", ["blocks.3.resid", "L3", "L3.logits", "3.z"])
def test_what_is_no_site_is_refused_with_what_to_write(text):
    with pytest.raises(ValueError, match=r"is not a site. Write L<layer>.<name>"):
        Site.parse(text)


def test_the_stream_has_no_heads():
    with pytest.raises(ValueError, match="resid_post is not split into heads: write L3.resid_post"):
        Site.parse("L3H1.resid_post")


def test_a_place_outside_the_model_is_refused():
    model = build("llama")
    with pytest.raises(IndexError, match="Layer 3 is out of range: the model has layers 0 to 2"):
        tap_of(model, Site(3, "resid_mid"))
    with pytest.raises(IndexError, match="Head 4 is out of range: layer 0 has heads 0 to 3"):
        tap_of(model, Site(0, "z", 4))
    with pytest.raises(ValueError, match="L0.result needs a head"), attached(model, Site(0, "result"), lambda _: None):
        pass
