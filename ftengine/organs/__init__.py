"""Pseudo organ labels: what can make them, and how they get into a store."""
