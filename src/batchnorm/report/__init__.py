"""Reports: what they say (document), and how it looks as text and as a page."""

from batchnorm.report.document import Document, Facts, HeatMap, Paragraph, Plot, Plots, Section, Series, Table
from batchnorm.report.result import Result

__all__ = ["Document", "Facts", "HeatMap", "Paragraph", "Plot", "Plots", "Result", "Section", "Series", "Table"]
