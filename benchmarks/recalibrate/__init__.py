"""How exact recalibration is, and what it costs, beside torch's ``update_bn`` and fvcore's ``update_bn_stats``.

    python -m benchmarks.recalibrate [--quick] [--only exact|cost]    measure; writes rows.jsonl
    python -m benchmarks.recalibrate.report                           docs/recalibrate-table.md and the plot, from rows

Both run in the repository's root. fvcore and a package of architectures (torchvision, timm, pytorchcv) take part where
they are installed. One file for the ways of measuring (``methods.py``), one for each question.
"""
