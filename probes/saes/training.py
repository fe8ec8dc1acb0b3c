"""Train an autoencoder with SAELens' own trainer, on activations streamed by our recorder."""

import hashlib
import json
import random
import shutil
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from probes.files import locked, staged_folder
from probes.model.architectures import width_of
from probes.model.loading import fingerprint, origin_of
from probes.model.sites import Site
from probes.saes.loading import load_sae
from probes.saes.reading import streamed
from probes.saes.sae import Birth, SparseAutoencoder
from probes.texts import read_json
from probes.thinking.spans import Span
from probes.words import checked

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

Architecture = Literal["topk", "batchtopk", "jumprelu", "standard"]


@checked
@dataclass(frozen=True)
class SAETraining:
    """How an autoencoder is trained: `tokens` in all, over the texts as often as that takes, `batch_size` a step.

    `k` is of `topk` and `batchtopk`, `l1` the penalty of `standard`, `l0` that of `jumprelu`. The rate is constant,
    after a warm-up of a twentieth of the steps, and falls to a tenth over the last fifth. Activations are scaled to a
    mean norm of the root of their width, which the weights then hold. Work is kept after each of `rounds`.

    >>> from probes.saes import SAETraining
    >>> SAETraining(d_sae=3072, tokens=600_000).k
    32
    """

    d_sae: int
    tokens: int
    architecture: Architecture = "topk"
    k: int = 32
    l1: float = 5.0
    l0: float = 5.0
    lr: float = 1e-3
    batch_size: int = 1024
    rounds: int = 10
    seed: int = 0


@checked
def train_sae(
    model: PreTrainedModel,
    spans: Sequence[Span],
    site: Site | str,
    how: SAETraining,
    *,
    store: Path | None = None,
) -> SparseAutoencoder:
    """A sparse autoencoder of what the model holds at a site, over the spans of some texts, attention sinks left out.

    Activations are read text by text in an order that the seed fixes, mixed in a buffer, and never stored. With
    `store`, a folder, the work is kept there round by round: a run that was killed and started again ends with the same
    bytes. Needs the extra `saes`. Raises ValueError where `store` holds other work, or there are no spans.

    >>> from probes import load
    >>> from probes.saes import SAETraining, train_sae
    >>> from probes.thinking import text_span
    >>> model = load("organism")
    >>> spans = [text_span(model, f"a {i} b +{j} c *7") for i in range(10) for j in range(10)]
    >>> how = SAETraining(d_sae=128, tokens=1_000, k=8, batch_size=64, rounds=2)
    >>> train_sae(model, spans, "L2.resid_post", how)
    SparseAutoencoder(L2.resid_post, 128 latents of 96, topk)
    """
    if not spans:
        raise ValueError("An autoencoder is trained on texts, but there are none.")
    site = Site.parse(site) if isinstance(site, str) else site
    torch.manual_seed(how.seed)
    trainer = _trainer(model, site, how)
    job = {"training": asdict(how), "site": str(site), "model": fingerprint(model), "spans": _checksum(spans)}
    with TemporaryDirectory() as scratch:
        place = Path(scratch) if store is None else Path(store)
        place.mkdir(parents=True, exist_ok=True)
        with locked(place):
            done = _resumed(trainer, place, job)
            steps = how.tokens // how.batch_size
            with tqdm(total=steps, initial=trainer.n_training_steps, desc="training", unit="step", leave=False) as bar:
                for number in range(done, how.rounds):
                    _round(trainer, model, spans, site, how, number, bar)
                    _keep(trainer, place, job, number + 1)
            return _finished(trainer, place, site, str(origin_of(model).name))


def activations(
    model: PreTrainedModel, spans: Sequence[Span], site: Site, *, seed: int
) -> Generator[Float[Tensor, "pos width"]]:
    """Block by block, over and over, texts in an order drawn anew each time."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(spans)), len(spans))
        for start in range(0, len(order), _BLOCK):
            own = [spans[i] for i in order[start : start + _BLOCK]]
            yield torch.cat([read.x[read.used] for read in streamed(model, own, site, label="")])


_BLOCK = 64  # texts that are read at once


def _trainer(model: PreTrainedModel, site: Site, how: SAETraining) -> "SAETrainer[Any, Any]":
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    kinds: dict[str, tuple[str, dict[str, float]]] = {
        "topk": ("TopK", {"k": how.k}),
        "batchtopk": ("BatchTopK", {"k": how.k}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": how.l0}),
        "standard": ("Standard", {"l1_coefficient": how.l1}),
    }
    name, more = kinds[how.architecture]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=width_of(model, site),
        d_sae=how.d_sae,
        device=str(model.device),
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(hook_name=site.transformer_lens, model_name=str(origin_of(model).name)),
        **more,
    )
    steps = how.tokens // how.batch_size
    settings = SAETrainerConfig(
        total_training_samples=how.tokens,
        train_batch_size_samples=how.batch_size,
        lr=how.lr,
        lr_end=how.lr / 10,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(50, steps // 20),
        feature_sampling_window=10**9,
        device=str(model.device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, getattr(sae_lens, f"{name}TrainingSAE")(config), iter(()))


def _round(
    trainer: "SAETrainer[Any, Any]",
    model: PreTrainedModel,
    spans: Sequence[Span],
    site: Site,
    how: SAETraining,
    number: int,
    bar: "tqdm[Any]",
) -> None:
    """One of the rounds, whose stream begins anew, so that a run that goes on there sees the same."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    torch.manual_seed(how.seed * how.rounds + number)
    goal = min(how.tokens, how.tokens * (number + 1) // how.rounds)
    stream = activations(model, spans, site, seed=how.seed * how.rounds + number)
    batches = mixing_buffer(16 * how.batch_size, how.batch_size, stream)
    if trainer.activation_scaler.scaling_factor is None:
        norm = torch.cat([next(batches) for _ in range(10)]).norm(dim=1).mean()
        trainer.activation_scaler.scaling_factor = trainer.sae.cfg.d_in**0.5 / float(norm)
    while trainer.n_training_samples + how.batch_size <= goal:
        out = trainer.step(next(batches))
        trainer.n_training_steps += 1
        bar.update()
        if trainer.n_training_steps % 20 == 0:
            bar.set_postfix(_progress(trainer, out), refresh=False)
    stream.close()


@torch.no_grad()
def _progress(trainer: "SAETrainer[Any, Any]", out: Any) -> dict[str, str]:
    lost = (out.sae_out - out.sae_in).pow(2).sum(-1).mean()
    spread = (out.sae_in - out.sae_in.mean(0)).pow(2).sum(-1).mean()
    l0 = out.feature_acts.bool().float().sum(-1).mean()
    dead = int(trainer.dead_neurons.sum())
    return {"explained": f"{1 - float(lost / spread):.3f}", "L0": f"{float(l0):.0f}", "dead": f"{dead}"}


def _keep(trainer: "SAETrainer[Any, Any]", place: Path, job: dict[str, Any], done: int) -> None:
    """The state of the trainer, whole or not at all: the note that names it comes last."""
    rounds = place / "rounds"  # staging locks the folder that it is in, and this run holds its own
    rounds.mkdir(exist_ok=True)
    with staged_folder(rounds / str(done)) as stage:
        trainer.save_trainer_state(stage)
        torch.save(trainer.sae.state_dict(), stage / "sae.pt")
    (place / "training.new").write_text(json.dumps({"job": job, "done": done}), encoding="utf-8")
    (place / "training.new").replace(place / "training.json")
    if (rounds / str(done - 1)).is_dir():
        shutil.rmtree(rounds / str(done - 1))


def _resumed(trainer: "SAETrainer[Any, Any]", place: Path, job: dict[str, Any]) -> int:
    """How many rounds are done; the trainer is then as it was after them."""
    if not (place / "training.json").is_file():
        return 0
    note = read_json(place / "training.json", "note of a training")
    if note.get("job") != json.loads(json.dumps(job)):
        raise ValueError(
            f"{place} holds the training of another autoencoder, or on other texts. Remove it, or name another store."
        )
    folder = place / "rounds" / str(note["done"])
    trainer.load_trainer_state(folder)
    trainer.sae.load_state_dict(torch.load(folder / "sae.pt", weights_only=True))
    return int(note["done"])


@torch.no_grad()
def _finished(trainer: "SAETrainer[Any, Any]", place: Path, site: Site, model: str) -> SparseAutoencoder:
    """Its scale folded into the weights, and read as any other."""
    sae = trainer.sae
    factor = trainer.activation_scaler.scaling_factor
    if factor is not None:
        sae.fold_activation_norm_scaling_factor(factor)
        trainer.activation_scaler.scaling_factor = None
    with TemporaryDirectory(dir=place) as folder:
        sae.save_inference_model(folder)
        made = load_sae(folder, site=site)
    return replace(made, birth=Birth("SAELens", "trained here", model))


def _checksum(spans: Sequence[Span]) -> str:
    return hashlib.sha256(repr([(s.ids, s.start, s.stop) for s in spans]).encode()).hexdigest()[:16]
