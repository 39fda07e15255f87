"""A trained network on whole scans: ``ftengine predict``.

===================  =========================================================================
``predict``          many cases, each committed whole; what is complete is not done again
``inputs``           the cases: files of any kind that ``convert`` reads, or rows of a store
``sliding_windows``  overlapping windows, streamed as slabs along z
``infer``            a network's label map of one volume in memory
``onto_grid``        scores of the store's grid brought to the file's own grid
``plausibility``     warnings: another region, an organ that is not there
``outputs``          NIfTI, probabilities, the record of a case
``dicom_seg``        DICOM-SEG
===================  =========================================================================
"""
