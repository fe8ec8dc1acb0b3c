"""Training finds a planted dictionary, also out of a model; a killed run ends with the same bytes."""

import pytest
import torch
from families import build

from probes import Site, Span, load
from probes.saes import SAETraining, train_sae, training
from probes.saes.reading import streamed

D, ATOMS, ACTIVE = 32, 40, 3
HOW = SAETraining(d_sae=80, tokens=300_000, k=ACTIVE, batch_size=512, rounds=3, lr=3e-3)


def planted(n, seed):
    """Sparse sums of atoms on the sphere, and the atoms."""
    atoms = torch.nn.functional.normalize(torch.randn(ATOMS, D, generator=torch.Generator().manual_seed(0)), dim=1)
    numbers = torch.Generator().manual_seed(seed)
    which = torch.rand(n, ATOMS, generator=numbers).argsort(1)[:, :ACTIVE]
    sizes = torch.zeros(n, ATOMS).scatter(1, which, 1 + torch.rand(n, ACTIVE, generator=numbers))
    return sizes @ atoms, atoms


def recovered(sae, atoms):
    """The mean over atoms of the largest cosine with a decoder row."""
    rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
    return float((rows @ atoms.T).amax(0).mean())


@pytest.fixture
def model():
    return build("llama")


def test_a_planted_dictionary_is_found(model, monkeypatch):
    _, atoms = planted(1, 0)

    def stream(_model, _spans, _site, *, seed):
        while True:
            seed += 1
            yield planted(4_096, seed)[0]

    monkeypatch.setattr(training, "activations", stream)
    assert recovered(train_sae(model, [Span((1, 2), 0, 2)], Site(0, "resid_pre"), HOW), atoms) >= 0.9


def test_and_so_where_a_model_holds_it(model):
    """Its embeddings are the planted sums, and what is read before the first block is they."""
    sums, atoms = planted(model.config.vocab_size, 1)
    numbers = torch.Generator().manual_seed(2)
    vocabulary = model.config.vocab_size
    assert sums.shape[1] == model.config.hidden_size
    big = torch.nn.Embedding(6_000, D)
    with torch.no_grad():
        big.weight.copy_(planted(6_000, 3)[0])
    model.set_input_embeddings(big)
    assert vocabulary < 6_000
    spans = [Span(tuple(torch.randint(0, 6_000, (64,), generator=numbers).tolist()), 0, 64) for _ in range(400)]
    (read, *_) = streamed(model, spans[:1], Site(0, "resid_pre"))
    assert int(read.used.sum()) == 63  # the first token is a sink
    assert recovered(train_sae(model, spans, Site(0, "resid_pre"), HOW), atoms) >= 0.9


class TestGoingOn:
    SPANS = tuple(Span(tuple((7 * i + 3 * j) % 60 + 1 for j in range(40)), 0, 40) for i in range(40))
    HOW = SAETraining(d_sae=48, tokens=4_000, k=4, batch_size=64, rounds=4)

    @pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
    def test_a_run_that_was_killed_ends_with_the_same_bytes(self, tmp_path, monkeypatch, architecture):
        model = load("organism")
        how = SAETraining(**{**vars(self.HOW), "architecture": architecture})
        whole = train_sae(model, self.SPANS, "L1.resid_post", how, store=tmp_path / "whole")
        keep, kept = training._keep, []

        def killed(*args):
            if len(kept) == 2:
                raise KeyboardInterrupt
            kept.append(args)
            keep(*args)

        monkeypatch.setattr(training, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            train_sae(model, self.SPANS, "L1.resid_post", how, store=tmp_path / "cut")
        monkeypatch.undo()
        torch.manual_seed(123)  # whatever ran in between
        again = train_sae(model, self.SPANS, "L1.resid_post", how, store=tmp_path / "cut")
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            one, other = getattr(whole, name), getattr(again, name)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other), name

    def test_another_training_in_the_same_store_is_refused(self, tmp_path):
        model = load("organism")
        train_sae(model, self.SPANS, "L1.resid_post", self.HOW, store=tmp_path / "s")
        with pytest.raises(ValueError, match="holds the training of another autoencoder"):
            train_sae(model, self.SPANS, "L2.resid_post", self.HOW, store=tmp_path / "s")
        with pytest.raises(ValueError, match="there are none"):
            train_sae(model, [], "L1.resid_post", self.HOW)
