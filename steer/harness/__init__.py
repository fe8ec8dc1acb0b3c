"""Any task of lm-eval (EleutherAI's harness): its prompts, its metrics, its numbers, over our arms."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
