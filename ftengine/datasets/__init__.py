"""The public CT sources of the paper as data: what each holds, how its labels map to ours, which subsets it is part of."""
