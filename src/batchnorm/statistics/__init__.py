"""Population statistics: what the norms of a model meet, measured exactly."""

from batchnorm.statistics.recalibrate import recalibrate
from batchnorm.statistics.result import LayerStatistics, RecalibrateResult

__all__ = ["LayerStatistics", "RecalibrateResult", "recalibrate"]
