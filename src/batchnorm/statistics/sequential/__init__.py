"""The sequential order: each norm is measured while all norms before it are on their final statistics already.

::

    a run for each batch stops at a norm ── measure: all are there, its statistics are final ── sweep: to the next
         └── parked_runs, disk_cache: where runs wait
"""
