"""Whether a changed model is the same model: its outputs, and what it computes on the way."""
