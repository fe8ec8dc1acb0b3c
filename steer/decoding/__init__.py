"""Tokens decided beside the model: budgets, forced thinking, convergence, prompt styles."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    __file__,
    {
        "Ask": "PromptStyle",
        "Control": "DecodingControl",
        "Force": "BudgetForcing",
        "Rows": "DecodingState",
        "Rule": "StatedAnswer",
    },
)
