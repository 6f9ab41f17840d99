"""A model's dataflow, and what is done by it: convert, fold and place."""
