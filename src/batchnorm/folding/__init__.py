"""``fold``, ``unfold`` and ``refold``: norms with fixed statistics, absorbed by their neighbours.

::

    fold ── fold_model ── planning: which norm goes where
                       ── proving:  every value in float64; what does not hold stays, and it is planned again
                       ── writing:  the model changed, and a record of what it had
                       ── report:   what became of each norm
    program: the same for torch.export and torch.fx, opened into modules before and written back after
"""
