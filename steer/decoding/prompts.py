"""Prompt arms: what words alone do to the length of thinking, as a baseline of every edit and control."""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from probes.model.delimiters import thinking_span
from probes.model.loading import delimiters_of, tokenizer_of
from probes.model.tokens import Template, encode_prompt, words_ids
from probes.words import checked


@checked
@dataclass(frozen=True)
class PromptStyle:
    """How a question is put: words `before` and `after` it, the chat template, and how the turn begins.

    With `thought`, the model's turn begins with an opened thinking and these words (none, if empty), and with `closed`
    also with its closing delimiter. Where the template opens the thinking itself, it is not opened twice.

    >>> from probes import generate, load
    >>> from steer.decoding import PromptStyle
    >>> model, style = load("organism"), PromptStyle(after=" quick", thought="Okay")
    >>> completion = generate(model, [style.question("a 3 b +4 c *7")], prefill=style.prefill(model))[0]
    >>> completion.prompt
    '<bos> a 3 b +4 c *7 quick ? <think> Okay'
    """

    before: str = ""
    after: str = ""
    template: Template = field(default_factory=dict)
    thought: str | None = None
    closed: bool = False

    def question(self, words: str) -> str:
        """The question as it is put."""
        return f"{self.before}{words}{self.after}"

    def prefill(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Token ids that follow the prompt. Raises ValueError where the vocabulary cannot write the thought."""
        if self.thought is None:
            return ()
        delimiters = delimiters_of(model)
        prompt = encode_prompt(tokenizer_of(model), self.question(""), template=self.template)
        opened = thinking_span(prompt, [], delimiters) is not None
        thought = words_ids(tokenizer_of(model), self.thought, "thought") if self.thought else ()
        return (*(() if opened else delimiters.open), *thought, *(delimiters.close if self.closed else ()))


def ellipsis(words: str = "...\n") -> PromptStyle:
    """The thinking begins with an ellipsis, which lets a model choose whether to think (AutoThink, Tu et al. 2025).

    >>> from steer.decoding import ellipsis
    >>> ellipsis().thought.strip(), ellipsis().closed
    ('...', False)
    """
    return PromptStyle(thought=words)


def empty_thinking(words: str = "") -> PromptStyle:
    """The thinking is over before the model speaks (NoThinking, Ma et al. 2025); `words` are all that it holds.

    >>> from probes import load
    >>> from steer.decoding import empty_thinking
    >>> empty_thinking().prefill(load("organism"))  # the ids of <think> and </think>
    (3, 4)
    """
    return PromptStyle(thought=words, closed=True)


def thinking_off() -> PromptStyle:
    """What the chat template itself does for `enable_thinking=False`; templates that do not know it ignore it.

    >>> from probes import generate, load
    >>> from steer.decoding import thinking_off
    >>> generate(load("organism"), ["a 3 b +4 c *7"], template=thinking_off().template)[0].prompt
    '<bos> a 3 b +4 c *7 ? <think> </think>'
    """
    return PromptStyle(template={"enable_thinking": False})


def length_tag(tokens: int, words: str = " Think for {tokens} tokens.") -> PromptStyle:
    """The length asked for, in words after the question (L1, Aggarwal and Welleck 2025). Raises ValueError below 1.

    >>> from steer.decoding import length_tag
    >>> length_tag(100).question("What is 3 + 4?")
    'What is 3 + 4? Think for 100 tokens.'
    """
    if tokens < 1:
        raise ValueError(f"A length of {tokens} tokens cannot be asked for: at least 1.")
    return PromptStyle(after=words.format(tokens=tokens))


def step_by_step(words: str = " Think step by step.") -> PromptStyle:
    """A chain of thought asked for (Kojima et al. 2022).

    >>> from steer.decoding import step_by_step
    >>> step_by_step().question("What is 3 + 4?")
    'What is 3 + 4? Think step by step.'
    """
    return PromptStyle(after=words)
