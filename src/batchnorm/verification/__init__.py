"""Whether a changed model is the same model: its outputs (end_to_end), and what it computes on the way (same_dataflow).

How far two outputs may be apart is measured on the original: as far as one rounding of what was changed moves them.
"""
