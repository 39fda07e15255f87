"""Files to volumes: readers, resampling and the phantom."""
