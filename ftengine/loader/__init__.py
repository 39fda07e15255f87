"""From the store to batches: plan, reads ahead, the DALI graph, stages."""
