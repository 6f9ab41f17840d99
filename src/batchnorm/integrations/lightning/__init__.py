"""Recalibration as a callback of Lightning, whichever of its two names it is installed under."""

from batchnorm.integrations.lightning.callback import RecalibrateCallback

__all__ = ["RecalibrateCallback"]
