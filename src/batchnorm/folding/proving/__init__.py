"""A plan proved before anything is changed: every value in float64, and the range of every weight in its type."""
