"""Which layers have met batches that are not finite."""

from __future__ import annotations

from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.models.preconditions import require_module
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.select import named_norms

__all__ = ["nonfinite_batches"]


def nonfinite_batches(model: Module) -> dict[str, int]:
    r"""Return how many batches each layer has kept out of its running statistics, for those that have kept out any.

    A channel of one of this library's layers takes a training step of its running statistics,

    .. math::

        r \leftarrow (1 - \mathrm{momentum})\,r + \mathrm{momentum}\,b,

    b being mean and variance (unbiased, divisor n − 1) of the batch, only if both results are finite; else it keeps
    both as they were, bit for bit. A batch with such a channel is counted here, and not in ``num_batches_tracked``,
    which counts those that entered in every channel. So the average that ``momentum=None`` keeps is that of the batches
    that have entered. The output of the batch itself is what it always was.

    Training never waits for these counts: they stand on the layer's device, and this call fetches them. They are no
    part of the state dict, whose keys are torch's; ``copy.deepcopy`` and pickles of the model keep them.

    Args:
        model: any model with layers of this library, or such a layer itself.

    Returns:
        The names of layers, in registration order, with their numbers of batches; empty if all was finite.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        StateError: it holds none of this library's layers, and torch's let everything in.

    Example:
        >>> import batchnorm, torch
        >>> model = torch.nn.Sequential(batchnorm.nn.BatchNorm1d(2))
        >>> y = model(torch.tensor([[1.0, 5.0], [3.0, float("inf")]]))
        >>> model[0].running_mean, batchnorm.nonfinite_batches(model)
        (tensor([0.2000, 0.0000]), {'0': 1})
    """
    require_module("nonfinite_batches", model)
    layers = {n: m for n, m in named_norms(model).items() if isinstance(m, BatchNorm1d | BatchNorm2d | BatchNorm3d)}
    if not layers:
        raise StateError(
            f"nonfinite_batches: {type(model).__name__} holds no layer of this library, and torch's let everything "
            "into their statistics. Convert it first: batchnorm.convert(model)."
        )
    counts = {name: 0 if layer._refused is None else int(layer._refused) for name, layer in layers.items()}
    return {name: count for name, count in counts.items() if count}
