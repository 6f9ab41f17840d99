"""What it costs to watch a model: the forward pass with a watch, beside the same without one.

    python -m benchmarks.watch                   # MobileNetV2 and ResNet-18, 224 × 224, batch 8, one thread
    python -m benchmarks.watch --rounds 40 --networks mobilenet_v2

A round runs the plain model, the watched one and the one of which every tenth call is looked at, one after the other,
and the cost is the median over rounds of the ratio within a round: what disturbs the machine meets all of them alike.
Times are of the processor, in this process, so that what else runs counts as little as it can. The cost is that of
sixteen calls, of which one is looked at with all its operators, as the first two of a watch are, and the others by
hooks alone. Of ``every=10`` the mean of ten calls is taken, of which one is looked at. Norms hold the statistics of a
batch, as trained ones would.

Rows go to ``rows.jsonl``, with the machine, threads and versions. ``digits.py`` measures how often a watch is right.
"""
