"""Tests of ``ftengine.volume``."""
