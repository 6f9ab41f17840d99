"""``place``: norms put where they belong."""
