"""Population statistics: what the norms of a model meet, measured exactly."""

from batchnorm.statistics.population import LayerPopulation, Population
from batchnorm.statistics.recalibrate import recalibrate
from batchnorm.statistics.result import LayerStatistics, RecalibrateResult

__all__ = ["LayerPopulation", "LayerStatistics", "Population", "RecalibrateResult", "recalibrate"]
