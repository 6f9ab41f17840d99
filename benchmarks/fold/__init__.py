"""Which norms each folding tool removes, whether the outputs stay what they were, and what it gains.

    python -m benchmarks.fold [--only QUESTION] [--quick] [--inductor]    measure; adds to rows.jsonl
    python -m benchmarks.fold.report                                      docs/fold-table.md, from rows
    python -m benchmarks.fold.fuzz [--graphs N] [--seed N]                random networks, ours only

They run in the repository's root. ``patterns`` are small models, one for each way that a norm can stand in a network;
``networks`` are architectures of torchvision, timm and pytorchcv, as far as these are installed; ``speed`` is the
latency of what each tool returns; ``leftover`` that of networks in which many norms cannot be folded. One file a tool
(``tools``), one for each family of patterns (``patterns``).
"""
