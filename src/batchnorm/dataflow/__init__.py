"""What a run of a model shows: operators, values, what reads them, and how that differs at another size.

::

    model, example inputs ── sizes: what else it runs on ── trace: a run on each ── graph: calls and values
                                                                                     ├── norms: which calls are norms
                                                                                     └── unreached: code no run took
"""
