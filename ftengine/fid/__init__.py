"""FID and KID of synthetic against real tumours (Table A4): ``ftengine fid``.

====================  =============================================================
``tumor_images``      the slices and crops that are compared, in millimetres
``feature_networks``  Inception, a radiology network, or S: image to features
``inception``         the Inception of the published FID figures
``frechet``           the two distances, of features alone
``fid``               what is drawn, by tumour type and size, and the results
====================  =============================================================
"""
