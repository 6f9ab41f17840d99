"""Any model, whatever its layers: how it is called, copied, told apart, set aside and put back."""
