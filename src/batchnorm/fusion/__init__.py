"""``convert`` and ``revert``: this library's layers for torch's, fused with what follows them."""
