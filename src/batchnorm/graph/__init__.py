"""A model's dataflow, and what is rewritten by it: fold and place."""
