"""The chunked store: layout, index, conversion, reading, export."""
