"""What folders make of models: patterns, real networks, random ones; what they leave, and where they are wrong."""
