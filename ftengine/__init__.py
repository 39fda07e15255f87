"""ftengine: the data engine of FreeTumor."""

__version__ = "0.1.0"
