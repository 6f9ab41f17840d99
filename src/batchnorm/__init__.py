"""The whole life of a batch-normalized PyTorch model, one verb a stage.

=================================  ====================================================================================
``nn.BatchNorm1d/2d/3d``           drop-in layers, with activation, residual, mask, and errors that name the layer
:func:`convert`, :func:`revert`    a model's norms made ours, fused with what follows them, and back, losslessly
:func:`recalibrate`                population statistics from a stream of batches
:func:`merge`, :func:`update_bn`   averaged models: statistics of a mixture of models, or measured for averaged weights
:func:`freeze`, :func:`unfreeze`   a freeze that survives ``model.train()``
:func:`diagnose`                   why eval mode is bad: the guilty layer, the cause, the cure
:func:`use`, :func:`no_update`     which statistics normalize, and whether they move, for a block, in whatever mode
:func:`accumulated_update`         one step of the running statistics for several micro-batches
:func:`nonfinite_batches`          which layers have kept a batch with NaN or infinity out of their statistics
:func:`fold`                       norms absorbed by their neighbours, verified, with a reason for each one left
:func:`unfold`                     a folded model with its norms back, to go on training it
:func:`refold`                     a newly built model in the shape of the folded one, to load its weights into
:func:`check`, :func:`place`       placement and misuse, rule by rule; norms put where they belong
:func:`watch`                      is this still the data that the model was trained on?
=================================  ====================================================================================

``recalibrate``, ``merge``, ``freeze``, ``diagnose``, ``fold``, ``convert``, ``check``, ``place`` and ``watch`` return
one result object: it prints as a table, ``to_dict()`` gives plain data, ``to_html(path)`` a page.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm import errors, functional, nn
    from batchnorm import monitor as monitor
    from batchnorm import statistics as statistics
    from batchnorm.checks import CheckResult, check
    from batchnorm.diagnosis.diagnose import diagnose
    from batchnorm.diagnosis.result import DiagnoseResult
    from batchnorm.folding.fold import fold
    from batchnorm.folding.refold import refold
    from batchnorm.folding.result import FoldResult
    from batchnorm.folding.unfold import unfold
    from batchnorm.functional import active_backend
    from batchnorm.fusion.convert import convert, revert
    from batchnorm.fusion.result import ConvertResult
    from batchnorm.moments import Moments
    from batchnorm.monitor import WatchResult
    from batchnorm.monitor.watch import watch
    from batchnorm.nn.freeze import FreezeResult, freeze, is_frozen, unfreeze
    from batchnorm.nn.nonfinite import nonfinite_batches
    from batchnorm.nn.statistics_in_use import no_update, use
    from batchnorm.placement.place import PlaceResult, place
    from batchnorm.statistics import MergeResult, RecalibrateResult
    from batchnorm.statistics.accumulated_update import accumulated_update
    from batchnorm.statistics.merge import merge
    from batchnorm.statistics.recalibrate import recalibrate
    from batchnorm.statistics.update_bn import update_bn

__version__ = "0.1.0"

__all__ = [
    "CheckResult",
    "ConvertResult",
    "DiagnoseResult",
    "FoldResult",
    "FreezeResult",
    "MergeResult",
    "Moments",
    "PlaceResult",
    "RecalibrateResult",
    "WatchResult",
    "accumulated_update",
    "active_backend",
    "check",
    "convert",
    "diagnose",
    "errors",
    "fold",
    "freeze",
    "functional",
    "is_frozen",
    "merge",
    "nn",
    "no_update",
    "nonfinite_batches",
    "place",
    "recalibrate",
    "refold",
    "revert",
    "unfold",
    "unfreeze",
    "update_bn",
    "use",
    "watch",
]

# Where each name lives. It is fetched when it is first asked for, so that `batchnorm --help` need not wait for torch.
_HOMES = {
    "batchnorm.checks": ("CheckResult", "check"),
    "batchnorm.diagnosis.diagnose": ("diagnose",),
    "batchnorm.diagnosis.result": ("DiagnoseResult",),
    "batchnorm.functional": ("active_backend",),
    "batchnorm.fusion.convert": ("convert", "revert"),
    "batchnorm.fusion.result": ("ConvertResult",),
    "batchnorm.folding.fold": ("fold",),
    "batchnorm.folding.result": ("FoldResult",),
    "batchnorm.folding.refold": ("refold",),
    "batchnorm.folding.unfold": ("unfold",),
    "batchnorm.placement.place": ("PlaceResult", "place"),
    "batchnorm.moments": ("Moments",),
    "batchnorm.monitor": ("WatchResult", "watch"),
    "batchnorm.nn.freeze": ("FreezeResult", "freeze", "is_frozen", "unfreeze"),
    "batchnorm.statistics": ("MergeResult", "RecalibrateResult", "merge", "recalibrate", "update_bn"),
    "batchnorm.nn.nonfinite": ("nonfinite_batches",),
    "batchnorm.nn.statistics_in_use": ("no_update", "use"),
    "batchnorm.statistics.accumulated_update": ("accumulated_update",),
}
# Subpackages that documentation and messages name, imported when they are first asked for, likewise.
_SUBPACKAGES = (
    "checks",
    "dataflow",
    "demo",
    "diagnosis",
    "errors",
    "files",
    "folding",
    "functional",
    "fusion",
    "integrations",
    "kernels",
    "models",
    "moments",
    "monitor",
    "nn",
    "placement",
    "report",
    "statistics",
    "travel",
    "verification",
)
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"batchnorm.{name}")
    if name in _HOME_OF:
        value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
        return value
    raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES, "__version__"})
