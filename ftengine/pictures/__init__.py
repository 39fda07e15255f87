"""PNG pictures, all in radiological view: ``ftengine preview``, and the parts that the report draws with.

=================  ====================================================================
``panels``         slices, outlines, marks, scale bars: what every picture is made of
``hu_windows``     which HU are black and white, organ by organ
``preview``        painted patches, chosen and painted as training would
``sheets``         a sheet of one patch or volume, a contact sheet of many
``svg_panels``     the same panels as SVG, for pages
``calibration``    a calibration of the judge as lines, picture and table
``replayed``       the patches of a replay file
``store_picture``  what a store holds, at a glance
=================  ====================================================================
"""
