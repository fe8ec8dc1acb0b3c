"""What a model is given to read, as token ids; and its own logits after them."""

import inspect
from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.generation.completions import Completion
from probes.model.loading import tokenizer_of
from probes.model.positions import check_room
from probes.model.tokens import Message, encode_prompt

Source = str | Completion | Sequence[Message] | Sequence[int]


def token_ids(model: PreTrainedModel, source: Source) -> tuple[int, ...]:
    """The ids of a prompt or a conversation, as the chat template writes it; of a completion, its prompt included; of
    ids themselves.

    Raises ValueError where there is no token, or more than the model has positions for.

    >>> from probes import load
    >>> from probes.lens import token_ids
    >>> token_ids(load("organism"), "a 3 b +4"), token_ids(load("organism"), [1, 6, 17])
    ((1, 6, 17, 7, 27, 5), (1, 6, 17))
    """
    if isinstance(source, Completion):
        ids = tuple(source.all_ids)
    elif isinstance(source, str):
        ids = tuple(encode_prompt(tokenizer_of(model), source))
    else:
        messages = [one for one in source if isinstance(one, Mapping)]
        numbers = tuple(int(one) for one in source if not isinstance(one, Mapping))
        ids = tuple(encode_prompt(tokenizer_of(model), messages)) if messages else numbers
    if not ids:
        raise ValueError("There is no token to read: give a prompt, a completion, or token ids.")
    check_room(model, len(ids))
    return ids


def last_logits(model: PreTrainedModel, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
    """The model's own logits after the last token of each row, in float32."""
    known = inspect.signature(model.forward).parameters
    words = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **words).logits
    return logits[:, -1].float()
