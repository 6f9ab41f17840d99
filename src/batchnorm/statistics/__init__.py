"""Population statistics: what the norms of a model meet, measured exactly; and several models made one.

::

    batches ── stream ── sequential/ or parallel ── tally: moments of each norm ── estimators ── finish: new buffers
    models  ── merge_sources ── merge: statistics of their mixture
"""

from batchnorm.statistics.merge import merge
from batchnorm.statistics.merge_result import MergedStatistics, MergeResult
from batchnorm.statistics.population import LayerPopulation, Population
from batchnorm.statistics.recalibrate import recalibrate
from batchnorm.statistics.result import LayerStatistics, RecalibrateResult
from batchnorm.statistics.update_bn import update_bn

__all__ = [
    "LayerPopulation",
    "LayerStatistics",
    "MergeResult",
    "MergedStatistics",
    "Population",
    "RecalibrateResult",
    "merge",
    "recalibrate",
    "update_bn",
]
