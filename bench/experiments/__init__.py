"""Experiments on phantoms: trained networks compared by paired seeds, in runs of hours that may be stopped and taken up again."""
