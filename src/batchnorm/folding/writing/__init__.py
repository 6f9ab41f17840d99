"""A proved plan written into a model, and what is kept for the way back."""
