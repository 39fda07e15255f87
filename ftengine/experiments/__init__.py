"""Experiments: a plan of stores, folds and methods, cut into units that are run, resumed and collected into tables (docs/experiments.md)."""
