"""One self-contained HTML file on runs and evaluations: ``ftengine report``.

==============  ======================================================================
``report``      what there is to show, and the page's parts in their order
``results``     the part on evaluations: tables, paired comparison, cases
``quality``     the part on painting and quality control, with the calibration
``training``    the part on training: curves, validation, speed
``run_folder``  a run's folder, read forgivingly
``scores``      an evaluation's JSON, read forgivingly
``cases``       the best and worst cases, drawn from the store
``charts``      lines, strips, points, heat maps as SVG
``figures``     painted patches and cases as figures with captions
``page``        headings, tables, the file itself
==============  ======================================================================
"""
