"""The paper's claim, in small: does painting tumours on unlabelled volumes help a segmenter that has few labels? (docs/few-labels.md)

=============  ==============================================================================================
``protocol``   all sizes: ``protocol.yaml`` and a user's file over it
``arms``       what is compared: one table of arms and one of generators
``units``      the work, cut into units with a result file each, and what each waits for
``data``       phantoms, store, and the truth about the test set's tumours
``work``       what a unit does, with the engine's own stages
``scores``     Dice, single tumours, false positives of a volume
``schedule``   runs units in processes, as many at a time as asked; takes up where a killed run stopped
``statistics`` means, paired differences, t-tests with Holm's correction
``report``     Markdown, JSON, pictures
=============  ==============================================================================================

Phantoms are synthetic: no figure of this experiment is evidence about patients.
"""

from ftengine.bench.experiments.few_labels.program import main

__all__ = ["main"]
