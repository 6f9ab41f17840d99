"""``place``: norms put where they belong, behind layers and in front of activations, so that nothing changes.

::

    model, example inputs ── dataflow ── sites: where a norm belongs ── insertion ── the same outputs, or all taken back
"""
