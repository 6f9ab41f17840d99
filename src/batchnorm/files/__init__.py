"""Files: tensors by name with a checksum, outputs that appear together or not at all, archives that nobody trusts."""
