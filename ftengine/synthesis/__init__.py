"""Painting tumours: shapes, textures and Eq. 1, on a batch."""
