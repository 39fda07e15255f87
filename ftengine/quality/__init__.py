"""Quality control of painted tumours: Eq. 4-5 and the gate."""
