"""Programs, ``torch.fx.GraphModule`` and ``torch.export.ExportedProgram``: read and rewritten as graphs."""
