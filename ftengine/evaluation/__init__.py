"""Label maps against the truth: the paper's measures, tables, folds and paired tests.

=================  ==================================================================================
``metrics``        Dice (Eq. 9), HD95, surface Dice, detection by volume (Eq. 7, 10, 11) of one case
``surface``        distances of surfaces, in millimetres
``lesions``        detection lesion by lesion, by size
``evaluate``       a checkpoint on a store, or a folder of predictions: every case's scores
``pairs``          which prediction belongs to which truth
``scoring_jobs``   the same scores from several processes
``compare``        several evaluations beside each other: folds, paired tests
``statistics``     means, bootstrap intervals, t-test, Wilcoxon
``tables``         rich, Markdown, LaTeX, CSV in the shape of Tables A5-A10
``validator``      the measure that training watches
``shape_measures`` size and shape of one tumour
=================  ==================================================================================
"""
