"""Operators that absorb an affine map: a file a family, and in it everything that is known of an operator.

::

    table: every row ── operator: what a row says
                          ├── linear_operator: weighted sums ── linear, convolution ── transposed_convolution
                          ├── embedding
                          └── norm

A row says which maps the operator can take in and with which new weight and bias, on which axis its channels lie, what
a pass of it costs, how its layer is built from a call's arguments, in which forms programs write it, and how it is
written into one. To add an operator, add its row here and list it in ``table``; nothing else asks for it by name.
"""
