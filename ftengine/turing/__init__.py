"""The Visual Turing Test as a reader study: blinded cases, a page that shows them to readers, and the scores.

=============  ==================================================================================
``cases``      real tumours cut out of a store, painted ones cut out of the same grid in the same way
``study``      the study folder and its key: what is in them, how each vouches for the other
``build``      draws the cases, writes both
``answers``    what readers said: appended, never changed, safe on the disk before it is acknowledged
``serve``      the web application; it never opens the key
``rates``      sensitivity, specificity and accuracy (Eq. 7-8), averaged as Tables A1-A3 average them
``agreement``  kappas, AUC, resampled intervals
``score``      study and key and answers to rates, tables and files
=============  ==================================================================================

Source: FreeTumor, "Clinician evaluation of synthetic tumors", Fig. 2, Tables A1-A3.
"""
