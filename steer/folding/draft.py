"""New weights before they are written: made in float32, rounded once, or refused whole."""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel


class NotFoldable(ValueError):
    """No change of weights equals the intervention at this site.

    >>> import torch
    >>> from probes import Site, load
    >>> from steer import Add, NotFoldable, Recipe
    >>> from steer.folding import NeedsBias, check_folds
    >>> model = load("organism")
    >>> try:
    ...     check_folds(model, Recipe.of(model, [Add(Site(1, "resid_post"), torch.ones(96))]))
    ... except NotFoldable as error:
    ...     print(error)
    L1.resid_post is not written by one matrix, but by the whole stream before it.
    >>> issubclass(NeedsBias, NotFoldable)
    True
    """


class NeedsBias(NotFoldable):
    """A bias would make it foldable, and the matrix has none.

    >>> from steer.folding import NeedsBias, NotFoldable
    >>> issubclass(NeedsBias, NotFoldable)
    True
    """


class Draft:
    """The tensors that change, in float32 while they are worked on, and written once: a refusal leaves none changed.

    `write` gives each parameter other memory, so that a model which shares the old one keeps it.
    """

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self.rounded: dict[Tensor, Tensor] = {}

    def __getitem__(self, parameter: Tensor) -> Tensor:
        if parameter not in self.copies:
            self.copies[parameter] = self.rounded.pop(parameter, parameter).detach().float().clone()
        return self.copies[parameter]

    @property
    def changed(self) -> list[Tensor]:
        return [*self.rounded, *self.copies]

    def round(self) -> None:
        """To the dtype of the weights, what is worked on no longer: the copies of one layer at a time are held."""
        for parameter in list(self.copies):
            self.rounded[parameter] = self.copies.pop(parameter).to(parameter.dtype)

    def write(self) -> None:
        self.round()
        for parameter, value in self.rounded.items():
            parameter.data = value


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model once more, of parameters of its own in the memory of the model's."""
    memo: dict[int, Tensor] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)
