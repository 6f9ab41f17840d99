"""Watching a model at work: drift from the stored statistics, saturated and dead units.

::

    calls of the model ── forwards: hooks, operators ── observe ── stream: moments ── drift: is it the stored data?
                                                                └── saturation: units that no longer learn
"""

from batchnorm.monitor.drift import ChannelDrift, LayerDrift
from batchnorm.monitor.measure import measure
from batchnorm.monitor.result import WatchResult
from batchnorm.monitor.saturation import ActivationUse
from batchnorm.monitor.watch import Watch, watch

__all__ = ["ActivationUse", "ChannelDrift", "LayerDrift", "Watch", "WatchResult", "measure", "watch"]
