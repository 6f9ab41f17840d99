"""``convert`` and ``revert``: this library's layers for torch's, fused with activation and addition behind them.

::

    convert ── classes exchanged ── find: norms followed by an activation or an addition alone ── check: proved
"""
