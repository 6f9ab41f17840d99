"""Which norm goes where: its map cut in two, the layers that absorb it, their new parameters."""
