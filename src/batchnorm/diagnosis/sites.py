"""Every set of running statistics of a model, those that the user froze included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.nn import Module

from batchnorm.errors import StateError
from batchnorm.models.preconditions import lazy_names
from batchnorm.nn.freeze import is_frozen
from batchnorm.nn.select import listed, meant_by, named_norms
from batchnorm.statistics.sites import Sites, has_loose_pair

__all__ = ["EverySite", "accused_by", "frozen_norms"]


class EverySite(Sites):
    """The running statistics of a model. A frozen norm may be the guilty one, so none is spared.

    Args:
        model: any model, in the modes that its user left it in.

    Raises:
        StateError: the model holds no norm, or is lazy.
    """

    def __init__(self, model: Module) -> None:
        lazy = lazy_names(model)
        if lazy:
            raise StateError(f"diagnose: {lazy[0]} has no value yet. Run the model once on real inputs first.")
        if not named_norms(model) and not has_loose_pair(model):
            raise StateError(
                f"diagnose: {type(model).__name__} holds no batch norm, so there is nothing to diagnose. Pass the "
                "model as it was before its norms were folded away."
            )
        super().__init__(model, "*", may_be_none=True)  # a norm that keeps no statistics is a finding


def accused_by(model: Module, names: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Return whether a layer of some name may be called guilty.

    Raises:
        ArgumentTypeError: a name is no text.
        StateError: there is no name.
        UnknownNameError: a name means no norm.
    """
    if names is None:
        return lambda layer: True
    norms = {site.name for site in Sites(model, names, may_be_none=True).known}
    several = listed(names)
    return lambda layer: layer in norms or any(meant_by(name, layer) for name in several)


def frozen_norms(model: Module) -> dict[str, str]:
    """Return how the user froze norms, as the end of a sentence, by their names: in the modes that the model is in."""
    found = {}
    for name, norm in named_norms(model).items():
        if is_frozen(norm):
            found[name] = "frozen by batchnorm.freeze"
        elif model.training and not norm.training:
            found[name] = "frozen by hand: in eval mode inside a model in train mode"
    return found
