"""SAE-Tuning: a LoRA trained around a frozen autoencoder, on answers without a trace (Wang et al. 2025)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probes.files import staged_folder
from probes.model.loading import tokenizer_of
from probes.model.quantised import merge_adapters
from probes.saes.sae import SparseAutoencoder
from probes.tables import Brief
from steer.tasks.task import Problem
from steer.training.splicing import spliced

SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>."
)


@dataclass(frozen=True)
class SAETuning:
    """How the adapter is trained, by default as in the paper's released code, whose loss is a sum over positions.

    `through`: gradients pass the autoencoder, so that layers below it learn, too; the released code ends them there,
    and adapts only the layers above. `length`: tokens of a packed text.

    >>> from steer.training import SAETuning
    >>> SAETuning(through=False).rate
    1e-06
    """

    rank: int = 32
    alpha: int = 128
    dropout: float = 0.05
    rate: float = 1e-6
    epochs: int = 2
    clip: float = 1.0
    length: int = 2048
    through: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False, repr=False)
class SAETuned(Brief):
    """A copy of the model with the adapter attached, and the KL of every step, in nats, summed over its text.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder
    >>> from steer.training import SAETuning, tune_with_sae
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L1.resid_post", d_in=96, d_sae=192, k=96)
    >>> tuned = tune_with_sae(model, sae, ["a 3 b +4"], SAETuning(rank=2, epochs=1))
    >>> tuned.merged().num_parameters() == model.num_parameters()
    True
    """

    model: PreTrainedModel
    losses: tuple[float, ...]

    def save(self, folder: str | Path) -> None:
        """The adapter alone, as peft loads it. Raises FileExistsError."""
        with staged_folder(Path(folder)) as stage:
            self.model.save_pretrained(stage)

    def merged(self) -> PreTrainedModel:
        """A copy whose weights hold it: an ordinary model."""
        twin = deepcopy(self.model)
        merge_adapters(twin)
        return twin


def trigger_texts(problems: Sequence[Problem]) -> list[str]:
    """Question and verified answer, which stands where the thinking would: no trace of reasoning (Wang et al. 2025).

    >>> from steer.tasks import Problem
    >>> from steer.training import trigger_texts
    >>> trigger_texts([Problem("1", "What is 2+2?", "4")])[0].endswith("<answer> Answer: 4</answer>")
    True
    """
    return [
        f"{SYSTEM} User: {p.question} Assistant: <think> {p.answer} </think> <answer> Answer: {p.answer}</answer>"
        for p in problems
    ]


def tune_with_sae(
    model: PreTrainedModel,
    sae: SparseAutoencoder,
    texts: Sequence[str],
    how: SAETuning = SAETuning(),  # noqa: B008
) -> SAETuned:
    """Train a LoRA so that the model with the autoencoder spliced in predicts what it does without both.

    Loss: KL(plain || adapted and spliced), over every token of the packed texts. Base weights and autoencoder are
    frozen; the autoencoder is gone afterwards. The model is not touched. Needs the extra `lora`. Raises ImportError
    without it, ValueError where there are no texts, or the autoencoder fits no site of the model.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder
    >>> from steer.training import SAETuning, tune_with_sae
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L1.resid_post", d_in=96, d_sae=192, k=96)
    >>> how = SAETuning(rank=4, alpha=8, rate=1e-3, epochs=1, length=16)
    >>> tuned = tune_with_sae(model, sae, ["a 3 b +4 c *7 ? <think> </think> 9"] * 8, how)
    >>> len(tuned.losses) > 3
    True
    """
    if find_spec("peft") is None:
        raise ImportError("SAE-Tuning trains an adapter of the package peft: pip install 'thinksteer[lora]'.")
    if not texts:
        raise ValueError("SAE-Tuning needs texts of questions and answers, but there are none.")
    torch.manual_seed(how.seed)
    twin = _adapted(model, how)
    rows = packed(tokenizer_of(model), texts, how.length)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=how.rate)
    losses = []
    twin.train()
    for _ in range(how.epochs):
        for row in tqdm(rows, desc="tuning", unit="text", leave=False):
            loss = divergence_of(twin, sae, row.to(model.device)[None], through=how.through)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, how.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    twin.eval()
    return SAETuned(twin, tuple(losses))


def divergence_of(
    twin: PreTrainedModel, sae: SparseAutoencoder, ids: Int[Tensor, "batch pos"], *, through: bool
) -> Float[Tensor, ""]:
    """KL(plain || adapted and spliced), summed over positions, by the number of rows."""
    with torch.no_grad(), _without_adapter(twin):
        plain = torch.log_softmax(twin(input_ids=ids).logits.float(), -1)
    with spliced(twin, sae, through=through):
        adapted = torch.log_softmax(twin(input_ids=ids).logits.float(), -1)
    return torch.nn.functional.kl_div(adapted, plain, reduction="batchmean", log_target=True)


def packed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> list[Int[Tensor, " pos"]]:
    """The texts one after another, each after an end token, cut to `length`; what is left over is dropped, if anything
    is whole."""
    end = tokenizer.eos_token_id
    ids = [i for text in texts for i in (end, *tokenizer.encode(text, add_special_tokens=False))]
    whole = [torch.tensor(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    return whole or [torch.tensor(ids)]


def attach_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """A copy of a model of the same family whose weights hold an adapter that was trained elsewhere.

    >>> from probes import load
    >>> from probes.saes import SparseAutoencoder
    >>> from steer.training import SAETuning, attach_adapter, tune_with_sae
    >>> model = load("organism")
    >>> sae = SparseAutoencoder.at_random("L1.resid_post", d_in=96, d_sae=192, k=96)
    >>> tuned = tune_with_sae(model, sae, ["a 3 b +4"], SAETuning(rank=2, epochs=1))
    >>> tuned.save("adapter")
    >>> attach_adapter(model, "adapter").num_parameters() == model.num_parameters()
    True
    """
    twin = deepcopy(model)
    twin.load_adapter(str(folder))
    merge_adapters(twin)
    return twin


def _adapted(model: PreTrainedModel, how: SAETuning) -> PreTrainedModel:
    from peft import LoraConfig

    twin = deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    config: Any = LoraConfig(
        r=how.rank, lora_alpha=how.alpha, lora_dropout=how.dropout, target_modules=_linears(twin), task_type="CAUSAL_LM"
    )
    twin.add_adapter(config)
    return twin


def _linears(model: PreTrainedModel) -> list[str]:
    """Every linear layer of the blocks, by full name: attention and MLP, but no router and no unembedding."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not name.endswith((".gate", ".router"))
    ]


@contextmanager
def _without_adapter(twin: PreTrainedModel) -> Iterator[None]:
    was = twin.training
    twin.eval()
    twin.disable_adapters()
    try:
        yield
    finally:
        twin.enable_adapters()
        twin.train(was)
