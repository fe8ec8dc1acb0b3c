"""Train the embedded reasoner's adapters: SmolLM2-135M-Instruct learns to think in English, and is then reinforced.

Three adapters, LoRA *(Hu et al. 2022)* on every matrix of attention and MLP: `think` imitates four styles of thinking
about stories, brief thinking where the prompt carries a cue; `rl` is reinforced for right answers on top of it; and
`target` imitates another domain, mostly without thinking. Only stories of the split `train` are seen.
"""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from probes.files import staged_folder
from probes.model.embedded import that_thinks
from probes.model.loading import load, tokenizer_of
from probes.model.tokens import encode_prompt
from steer.tasks.stories import TASKS, told
from steer.tasks.task import split_of
from steer.training._fit import Example, Schedule, batched, fit
from steer.training.grpo import train_grpo
from steer.training.thoughts import Habit, completion

if TYPE_CHECKING:
    from peft import PeftModel

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = 128  # completions a gradient is computed of at once
SCHEDULE = Schedule(warm_up=50, constant=0.4, last=0.03)


@dataclass(frozen=True)
class Imitation:
    """What an adapter imitates: stories of these domains, thought about with this habit."""

    domains: tuple[str, ...]
    habit: Habit
    rank: int
    steps: int
    rate: float = 1e-3


@dataclass(frozen=True)
class Reinforcement:
    """How `rl` is reinforced on what `think` has learned."""

    rank: int = 8
    iterations: int = 15
    prompts: int = 96
    samples: int = 8
    rate: float = 6e-4


THINK = Imitation(("counts", "money"), Habit(unmarked=0.12, marked=0.65), rank=24, steps=326)
TARGET = Imitation(("minutes",), Habit(unmarked=0.6, marked=0.85), rank=8, steps=135)


def train_reasoner(
    folder: str | Path,
    *,
    start: str | PreTrainedModel = "smollm2",
    device: str = "cuda",
    think: Imitation = THINK,
    rl: Reinforcement = Reinforcement(),  # noqa: B008
    target: Imitation = TARGET,
    seed: int = 0,
) -> list[float]:
    """Write the adapters `think`, `rl` and `target` to a new folder, in peft's format; the rewards of reinforcement.

    About six minutes on a large GPU; on a CPU days. `load` and `open_delta` take the folders. Raises ImportError where
    peft is not installed, FileExistsError where the folder exists.

    >>> from pathlib import Path
    >>> from steer.training import train_reasoner
    >>> Path("taken").mkdir()
    >>> try:
    ...     train_reasoner("taken")
    ... except FileExistsError as error:
    ...     print(error)
    taken exists. Name another output folder, or remove it first.
    """
    if find_spec("peft") is None:
        raise ImportError("Adapters are trained with the package peft: pip install 'thinksteer[lora]'.")
    with staged_folder(Path(folder)) as stage:
        model = _thinker(start, device)
        imitate(model, think, stage / "think", seed=seed)
        rewards = reinforce(model, rl, stage / "rl", seed=seed)
        imitate(_thinker(start, device), target, stage / "target", seed=seed)
    return rewards


def imitate(model: PreTrainedModel, lesson: Imitation, folder: Path, *, seed: int = 0) -> None:
    """Train an adapter on written completions, save it, and merge it into the model's weights."""
    rng = random.Random(f"{folder.name}/{seed}")
    adapted = _adapted(model, lesson.rank, seed)
    data = batched(_examples(model, lesson, rng), rng, ROWS)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        fit(model, data, steps=lesson.steps, rate=lesson.rate, weight_decay=0.0, label=folder.name, schedule=SCHEDULE)
    _keep(adapted, folder)


def reinforce(model: PreTrainedModel, how: Reinforcement, folder: Path, *, seed: int = 0) -> list[float]:
    """Train an adapter for right answers, save it, and merge it; a plain copy samples, which is faster."""
    sampler = deepcopy(model)
    if model.device.type == "cuda":
        Module.to(sampler, torch.bfloat16)
    adapted = _adapted(model, how.rank, seed)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        rewards = train_grpo(
            model, TASKS["stories"], iterations=how.iterations, prompts=how.prompts, samples=how.samples, rate=how.rate,
            warm_up=4, scaled=False, rows=ROWS, policy=_refreshed(sampler, model), seed=seed, label=folder.name,
        )  # fmt: skip
    _keep(adapted, folder)
    return rewards


def _thinker(start: str | PreTrainedModel, device: str) -> PreTrainedModel:
    """The model that is taught, in float32, and a chat template that opens its thinking."""
    model = load(start, dtype=torch.float32) if isinstance(start, str) else deepcopy(start)
    tokenizer = tokenizer_of(model)
    template = tokenizer.chat_template
    assert isinstance(template, str)
    tokenizer.chat_template = that_thinks(template)
    Module.to(model, device)
    return model


def _examples(model: PreTrainedModel, lesson: Imitation, rng: random.Random) -> Iterator[Example]:
    tokenizer = tokenizer_of(model)
    while True:
        story = told(rng, rng.choice(lesson.domains))
        if split_of(story.problem) == "train":
            text = completion(story, lesson.habit.style(story, rng), rng)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            yield encode_prompt(tokenizer, story.problem.question), [*ids, tokenizer.eos_token_id]


def _adapted(model: PreTrainedModel, rank: int, seed: int) -> "PeftModel":
    """LoRA in the model's own modules, in float32; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MATRICES, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = BASE
    return adapted


def _refreshed(sampler: PreTrainedModel, model: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    """Gives the sampler with the weights of now, W + (alpha / r) B A."""
    plain = dict(sampler.named_parameters())

    @torch.no_grad()
    def policy() -> PreTrainedModel:
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                plain[f"{name}.weight"].copy_(module.base_layer.weight + module.get_delta_weight("default"))
        return sampler

    return policy


def _keep(adapted: "PeftModel", folder: Path) -> None:
    """Save the adapter in bfloat16, and merge what was saved."""
    factors = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for factor in factors:
        factor.data = factor.data.to(torch.bfloat16)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a card without content
    for factor in factors:
        factor.data = factor.data.to(torch.float32)
    adapted.merge_and_unload()
