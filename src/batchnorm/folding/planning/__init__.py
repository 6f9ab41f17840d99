"""Which norm goes where: its map cut in two, the layers that absorb it, and their new parameters.

::

    plan ── splits: what goes back and what goes on ── travel ── absorbers ── merged_parameters
         ├── parallel: into the layer beside it        └── replacement: what stays of the norm's module
         └── find_multiply_adds: what is left becomes one multiply-add
"""
