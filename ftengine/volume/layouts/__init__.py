"""The shapes in which data sets of CT come, each a module that fills a ``Walk`` with what it found; ``choose.find_cases`` is the way in.

=========  ============================================================================================
folder     images and labels by their names, or a folder of labels (``ftengine.volume.discover``)
nnunet     nnU-Net raw, v1 and v2: imagesTr/CASE_0000.EXT, labelsTr/CASE.EXT, imagesTs, dataset.json
msd        Medical Segmentation Decathlon: the lists ``training`` and ``test`` of dataset.json
dicom      a tree of DICOM studies: axial CT series, however their files are spread over folders
csv        a CSV or TSV manifest: image, label, organ_label, case, dataset, split
=========  ============================================================================================
"""
