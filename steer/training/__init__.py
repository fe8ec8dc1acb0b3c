"""Gradients: the embedded model, its donors, and reinforcement learning of right answers."""

from probes.exports import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__, {"reinforce": "train_grpo"})
