"""A backward pass to activations: the weights frozen, long batches checkpointed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kvcalib.model.offloaded import is_offloaded

CHECKPOINT_TOKENS = 4096
"""Tokens of a batch from which on it is checkpointed."""


@contextlib.contextmanager
def frozen(model: PreTrainedModel, tokens: int, checkpointing: bool | None = None) -> Iterator[None]:
    """Freeze the weights, and checkpoint long batches and offloaded weights; undone at the end.

    Args:
        tokens: of a batch. checkpointing: whether layers run again for the backward pass; as needed if None.
    """
    training = model.training
    # By name: an offloaded parameter is a new object whenever its module has run.
    learning = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    model.requires_grad_(False)
    model.eval()
    if checkpointing is None:
        # Without it the backward pass would keep every offloaded weight that the forward pass has loaded.
        needed = tokens > CHECKPOINT_TOKENS or is_offloaded(model)
        checkpointing = needed and model.supports_gradient_checkpointing
    if checkpointing:
        # Stopped early, a layer's second run would leave its last module with its weight loaded.
        how = {"use_reentrant": False, "early_stop": not is_offloaded(model)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        # Checkpointing wants a layer in training mode; its children stay in eval mode, so dropout stays off.
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    try:
        yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in learning)
        model.train(training)
