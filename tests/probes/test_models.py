"""A model is the same however it is loaded, knows where it came from, and says what it lacks when asked."""

import copy
import json
import shutil

import pytest
import torch
from families import build, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.generation._generate import generate
from probes.generation.sampling import Sampling
from probes.model.delimiters import Delimiters
from probes.model.loading import (
    ORGANISM,
    delimiters_of,
    fingerprint,
    folder_of,
    identity_of,
    load,
    markers_of,
    origin_of,
    tokenizer_of,
)
from probes.model.tokens import REFLECTION_MARKERS, encode_prompt

CHAIN = "a 3 b +4 c *7"
# a tokenizer that does not think
PLAIN = build_tokenizer(("<pad>", "<bos>", "<eos>", "?"), "<bos> {{ messages[0]['content'] }} ?")


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@torch.no_grad()
def logits(model, text=CHAIN):
    return model(torch.tensor([encode_prompt(tokenizer_of(model), text)])).logits


def test_by_name_from_a_folder_and_as_an_object_it_is_the_same_model(organism, tmp_path):
    folder = shutil.copytree(ORGANISM, tmp_path / "copy")
    bare = AutoModelForCausalLM.from_pretrained(folder)
    for model in (load(folder), load(str(folder)), load(bare), load(bare, tokenizer=tokenizer_of(organism))):
        assert torch.equal(logits(model), logits(organism))
        assert fingerprint(model) == fingerprint(organism)
        assert (origin_of(model).name, folder_of(model)) == (str(folder), folder)
    assert (origin_of(organism).name, folder_of(organism)) == ("organism", ORGANISM)
    assert folder_of(build("llama")) is None


def test_a_model_that_never_went_through_load_is_read_by_the_name_in_its_config(organism):
    bare = AutoModelForCausalLM.from_pretrained(ORGANISM)
    assert origin_of(bare).name == str(ORGANISM)
    assert delimiters_of(bare) == delimiters_of(organism)
    assert tokenizer_of(bare).get_vocab() == tokenizer_of(organism).get_vocab()


@torch.no_grad()
def test_the_organism_is_a_plain_hugging_face_folder(organism):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(ORGANISM), AutoTokenizer.from_pretrained(ORGANISM)
    said = [{"role": "user", "content": CHAIN}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt")
    assert torch.equal(model(**batch).logits, logits(organism))
    out = model.generate(**batch, do_sample=False, max_new_tokens=48)
    ours = generate(organism, [CHAIN], sampling=Sampling(temperature=0, max_new_tokens=48))
    assert out[0].tolist() == list(ours[0].all_ids)
    assert not list(ORGANISM.glob("*.py"))
    assert "auto_map" not in (ORGANISM / "config.json").read_text()


def test_a_loaded_model_is_in_eval_mode_and_in_the_dtype_asked_for():
    assert not load("organism").training
    assert not load(build("llama").train(), tokenizer=build_tokenizer()).training
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in load("organism", dtype=dtype).parameters()} == {dtype}


def test_a_model_object_without_its_tokenizer_is_refused():
    model = AutoModelForCausalLM.from_config(build("llama").config)
    with pytest.raises(ValueError, match="A model object needs its tokenizer: load"):
        load(model)


def test_delimiters_are_missed_only_where_they_are_used():
    model = load(build("llama"), tokenizer=PLAIN)
    assert logits(model, "w7").shape == (1, 3, 97)
    with pytest.raises(ValueError, match=r"Is it a reasoning model\?"):
        delimiters_of(model)
    assert delimiters_of(load(model, tokenizer=PLAIN, delimiters=("w7 w8", "w9"))).open == (7, 8)
    given = Delimiters((7, 8), (9,), (3,))
    assert delimiters_of(load(model, tokenizer=PLAIN, delimiters=given)) is given


def test_the_markers_to_look_for_are_the_organisms_own_or_the_common_ones(organism):
    assert markers_of(organism) == ("Wait", "Hmm")
    assert markers_of(build("llama")) == REFLECTION_MARKERS


def test_the_fingerprint_is_that_of_the_checkpoint_not_of_the_dtype(organism):
    prints = {fingerprint(load("organism", dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert prints == {fingerprint(organism)}
    assert fingerprint(build("llama", seed=1)) == fingerprint(build("llama", seed=1, dtype=torch.bfloat16))
    assert fingerprint(build("llama", seed=1)) != fingerprint(build("llama", seed=2))


@torch.no_grad()
def test_the_fingerprint_notices_an_edit_of_any_one_tensor(model):
    prints = [fingerprint(model)]
    for parameter in model.parameters():
        parameter.mul_(1.5).add_(0.25)
        prints.append(fingerprint(model))
    assert len(set(prints)) == len(prints)


@torch.no_grad()
def test_a_deep_copy_keeps_its_origin_and_shares_no_weights(organism):
    twin = copy.deepcopy(organism)
    assert origin_of(twin) is origin_of(organism)
    assert identity_of(twin) == identity_of(organism)
    twin.lm_head.weight.add_(1)
    assert fingerprint(twin) != fingerprint(organism)
    assert identity_of(twin) | {"fingerprint": ""} == identity_of(organism) | {"fingerprint": ""}


def test_the_identity_of_a_model_names_its_sizes(organism):
    config = organism.config
    assert identity_of(organism) == {
        "name": "organism",
        "revision": None,
        "model_type": config.model_type,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "fingerprint": fingerprint(organism),
    }


def test_a_config_of_more_layers_than_any_model_has_is_refused(tmp_path):
    for words, sentence in (
        ({"num_hidden_layers": 3_000_000_000}, "config.json says num_hidden_layers=3,000,000,000: no model has more"),
        ({"num_experts": 1e12}, "num_experts=1,000,000,000,000.0: no model has more than 100,000"),
        ({"text_config": {"n_layer": 10_001}}, "n_layer=10,001: no model has more than 10,000"),
    ):
        folder = tmp_path / next(iter(words))
        shutil.copytree(ORGANISM, folder)
        config = json.loads((folder / "config.json").read_text()) | words
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=sentence):
            load(folder)
