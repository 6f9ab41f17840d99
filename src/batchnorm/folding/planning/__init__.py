"""Which norm goes where: its map cut in two, the layers that absorb it, and their new parameters.

::

    make_plan ── splits: what goes back and what goes on ── carry ── travel ── absorbers ── merged_parameters
              ├── parallel: into the layer beside the norm
              ├── removable_norm, replacement: what takes the place of the norm's module
              └── find_multiply_adds: what stays becomes one multiply-add
"""
