"""Reports: what they say (document), and how it looks as text and as a page."""

from batchnorm.report.document import (
    Diagram,
    Diagrams,
    Document,
    Facts,
    HeatMap,
    Node,
    Panel,
    Paragraph,
    Plot,
    Plots,
    Section,
    Series,
    Table,
)
from batchnorm.report.result import Result
from batchnorm.report.short import foremost

__all__ = [
    "Diagram",
    "Diagrams",
    "Document",
    "Facts",
    "HeatMap",
    "Node",
    "Panel",
    "Paragraph",
    "Plot",
    "Plots",
    "Result",
    "Section",
    "Series",
    "Table",
    "foremost",
]
