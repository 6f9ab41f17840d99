"""How an affine map travels along a dataflow: one small function per operator and direction.

A norm with fixed statistics is x ↦ s·x + t in each channel. Taken off its place, it goes back to what feeds it, or its
inverse goes on to what reads it, until operators absorb it::

    route ── rules: may the map cross this operator, and what is it behind it?
               ├── pointwise, pooling, arrange, join: a file a family
               └── Knowledge.absorbing: does the operator absorb it? The dataflow's own table says so

Nothing here knows of torch's modules, nor of the table of a dataflow (``batchnorm.absorbers`` is that of torch's).
"""
