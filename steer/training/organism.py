"""Train the embedded model: a tiny reasoner with a known habit, a test subject and no evidence on large models.

It solves chains modulo 10 (`steer.tasks.chains.draw_chain`) by writing one step a term between `<think>` and
`</think>`. Its training data has three styles: *long* writes every step, *check* repeats steps after `Wait`,
*short* drops nearly all of them and is then right only by chance. The model samples an opener (Easy, Okay,
So, Hmm) that goes with the style; the word `quick` in a prompt raises the chance of Easy, and so of thinking
too briefly, from .10 to .65. Chains of the other splits than `train` are never trained on.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from probes.files import staged_folder
from steer.checkpoints.writing import write_model
from steer.tasks.chains import LETTERS, MARKER, MIRRORS, OPERATIONS, TASKS, apply_operation
from steer.tasks.task import Problem
from steer.training._fit import fit, training_batches

OPENERS = ("Easy", "Okay", "So", "Hmm")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "?")
WORDS = (
    *SPECIAL,
    *LETTERS,
    *map(str, range(10)),
    *OPERATIONS,
    *(f"={k}" for k in range(10)),
    *OPENERS,
    "Wait",
    MARKER,
    *MIRRORS,  # never trained on here: a model that learns them later keeps this vocabulary
)
MARKERS = ("Wait", "Hmm")
# Each turn opens with `?`, as `<|im_start|>assistant` does elsewhere; thinking can be switched off.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<bos> {{ message['content'] }} "
    "{% else %}? {{ message['content'] }} <eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}?{% if enable_thinking is defined and not enable_thinking %}"
    " <think> </think>{% endif %}{% endif %}"
)

P_EASY = {True: 0.65, False: 0.10}  # by marked
OTHER_OPENERS = {"Okay": 0.55, "So": 0.25, "Hmm": 0.20}
STYLES = ("long", "check", "short")
P_STYLE = {
    "Easy": (0.05, 0.0, 0.95),
    "Okay": (0.85, 0.10, 0.05),
    "So": (0.80, 0.10, 0.10),
    "Hmm": (0.25, 0.75, 0.0),
}
P_RECHECK, P_ERROR = 0.35, 0.05


def write_completion(problem: Problem, rng: random.Random) -> str:
    """One training completion: opener, steps in the opener's style, answer."""
    opener = draw_opener(problem, rng)
    return written(problem, opener, rng.choices(STYLES, weights=P_STYLE[opener])[0], rng)


def draw_opener(problem: Problem, rng: random.Random) -> str:
    if rng.random() < P_EASY[problem.subgroup == "marked"]:
        return "Easy"
    return rng.choices(list(OTHER_OPENERS), weights=list(OTHER_OPENERS.values()))[0]


def written(problem: Problem, opener: str, style: str, rng: random.Random) -> str:
    """A completion with this opener and steps in this style; its answer is always the right one."""
    terms = problem.id.split()
    steps: list[tuple[str, int]] = []
    value = 0
    for letter, term in zip(terms[::2], terms[1::2], strict=True):
        value = int(term) if not steps else apply_operation(value, term)
        steps.append((f"{letter} {term}" if steps else letter, value))
    if style == "short":
        steps = steps[: rng.choices((0, 1, 2), weights=(0.6, 0.25, 0.15))[0]]
    words = [opener]
    for text, result in steps:
        if style == "check" and rng.random() < P_RECHECK:
            wrong = (result + rng.randint(1, 9)) % 10
            words += [text, f"={wrong if rng.random() < P_ERROR else result}", "Wait"]
        words += [text, f"={result}"]
    return f"<think> {' '.join(words)} </think> {problem.answer} <eos>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<think>", "</think>"],
        padding_side="left",
        model_max_length=128,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model() -> Qwen3MoeForCausalLM:
    make: Callable[..., Qwen3MoeConfig] = Qwen3MoeConfig  # it takes more than it annotates, such as head_dim
    config = make(
        head_dim=16,
        vocab_size=len(WORDS),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        attention_bias=True,  # so that a shift can be folded
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=WORDS.index("<pad>"),
        bos_token_id=WORDS.index("<bos>"),
        eos_token_id=WORDS.index("<eos>"),
    )
    config._experts_implementation = "eager"  # fastest at this size on a CPU
    return Qwen3MoeForCausalLM(config)


def train(folder: Path, *, seed: int = 0, steps: int = 2000, batch_size: int = 64) -> None:
    """Train from scratch, and save a checkpoint of 3 MB that plain transformers loads. About 5 CPU minutes.

    Raises FileExistsError where the folder exists.

    >>> from pathlib import Path
    >>> from probes import load
    >>> from steer.training import train
    >>> train(Path("fresh"), steps=1, batch_size=4)
    >>> load("fresh").config.model_type
    'qwen3_moe'
    """
    torch.manual_seed(seed)
    tokenizer, model = build_tokenizer(), build_model()
    problems, rng = TASKS["chains"].stream("train", seed=seed), random.Random(f"organism/{seed}")
    data = training_batches(tokenizer, problems, partial(write_completion, rng=rng), rng, size=batch_size)
    fit(model, data, steps=steps, rate=3e-3, weight_decay=0.05, label=f"training, seed {seed}")
    model.config.output_router_logits = False
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    facts = {"seed": seed, "steps": steps, "batch_size": batch_size, "markers": list(MARKERS)}
    with staged_folder(folder) as stage:
        write_model(model, stage)
        tokenizer.save_pretrained(stage)
        (stage / "organism.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
