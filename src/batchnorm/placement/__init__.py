"""``place``: norms put where they belong, behind layers and in front of activations, so that nothing changes."""
