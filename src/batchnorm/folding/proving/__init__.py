"""A plan proved before anything is changed: value by value in float64, and end to end."""
