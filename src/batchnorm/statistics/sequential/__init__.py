"""The sequential order: each norm is measured while all norms before it are on their final statistics already."""
