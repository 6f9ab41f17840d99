"""A proved plan written into a model (rewrite), and what the model had before, in memory or in a file (record)."""
