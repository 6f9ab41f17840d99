"""What a run of a model shows: operators, values, who reads them, and how that differs at another size."""
