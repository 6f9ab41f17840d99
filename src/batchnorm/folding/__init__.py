"""``fold``, ``unfold`` and ``refold``: norms with fixed statistics, absorbed by their neighbours."""
