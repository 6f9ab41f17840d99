"""What a training step costs in the norms: this library against torch, and against the memory's own speed.

    python -m benchmarks.train_step [--nets] [--quick] [--only TEXT ...]    measure; writes rows.jsonl
    python -m benchmarks.train_step.report                                 docs/performance*.md and the plot, from rows
    python -m benchmarks.train_step.calibrate                              where the native kernels begin to pay

All three run in the repository's root, in an environment that has this library and torch. One file a competitor, in
``competitors/``; what is timed, and what is not, is written in ``frame.py``; the fewest bytes possible in ``limit.py``.
"""
