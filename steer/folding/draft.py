"""New weights before they are written: made in float32, rounded once, or refused whole."""

from torch import Tensor


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
    """Float32 copies of the tensors that change, written back once: several edits round once, a refusal leaves none."""

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}

    def __getitem__(self, parameter: Tensor) -> Tensor:
        if parameter not in self.copies:
            self.copies[parameter] = parameter.detach().float().clone()
        return self.copies[parameter]

    def write(self) -> None:
        for parameter, value in self.copies.items():
            parameter.data.copy_(value.to(parameter.dtype))
