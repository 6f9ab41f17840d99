"""How an affine map travels along the dataflow: one small function per operator and direction."""
