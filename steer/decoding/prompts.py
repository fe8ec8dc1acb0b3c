"""Prompt arms: what words alone do to the length of thinking, as a baseline of every edit and control."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from probes.model.loading import delimiters_of, tokenizer_of
from probes.model.tokens import encode_prompt, thinking_span, words_ids


@dataclass(frozen=True)
class PromptStyle:
    """How a question is put: words `before` and `after` it, arguments of the chat template, and how the turn begins.

    With `thought`, the model's turn begins with an opened thinking and these words (none, if empty), and with `closed`
    also with its closing delimiter. Where the template opens the thinking itself, it is not opened twice.
    """

    before: str = ""
    after: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    thought: str | None = None
    closed: bool = False

    def question(self, words: str) -> str:
        return f"{self.before}{words}{self.after}"

    def prefill(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Token ids that follow the prompt. Raises ValueError where the vocabulary cannot write the thought."""
        if self.thought is None:
            return ()
        delimiters = delimiters_of(model)
        prompt = encode_prompt(tokenizer_of(model), self.question(""), template=self.template)
        opened = thinking_span(prompt, [], delimiters) is not None
        words = words_ids(tokenizer_of(model), self.thought, "thought") if self.thought else ()
        return (*(() if opened else delimiters.open), *words, *(delimiters.close if self.closed else ()))


def ellipsis(words: str = "...\n") -> PromptStyle:
    """The thinking begins with an ellipsis, which lets a model choose whether to think (AutoThink, Tu et al. 2025)."""
    return PromptStyle(thought=words)


def empty_thinking(words: str = "") -> PromptStyle:
    """The thinking is over before the model speaks (NoThinking, Ma et al. 2025); `words` are all that it holds."""
    return PromptStyle(thought=words, closed=True)


def thinking_off() -> PromptStyle:
    """What the chat template itself does for `enable_thinking=False`; templates that do not know it ignore it."""
    return PromptStyle(template={"enable_thinking": False})


def length_tag(tokens: int, words: str = " Think for {tokens} tokens.") -> PromptStyle:
    """The length asked for, in words after the question (L1, Aggarwal and Welleck 2025)."""
    return PromptStyle(after=words.format(tokens=tokens))


def step_by_step(words: str = " Think step by step.") -> PromptStyle:
    """A chain of thought asked for (Kojima et al. 2022)."""
    return PromptStyle(after=words)
