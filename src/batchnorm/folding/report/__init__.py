"""The report of a fold: sections of the report, sentences about norms, diagrams, ranges for int8, latency."""
