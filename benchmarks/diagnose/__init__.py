"""Whether diagnose names the right cause and the right layer of faults that were planted, one at a time.

    python -m benchmarks.diagnose [--quick] [--faults TEXT ...] [--seeds N]    plant, diagnose, write rows and the table
    python -m benchmarks.diagnose.report                                       docs/diagnose-table.md alone, from rows

Both run in the repository's root, in an environment that has this library, torch and scikit-learn. One small function
a fault, in ``faults/``; networks in ``architectures.py``, their training in ``training.py``.
"""
