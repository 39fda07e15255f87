"""What became of a patch, as plain values that every collate function takes."""

import math

from ftengine.synthesis.painting import Painting
from ftengine.types import Painted


def verdict_of(painted: Painted | None) -> dict[str, bool | float | str]:
    """The fate of one patch; the keys are always the same, so that patches can be collated.

    painted: a tumour was painted on it. passed: it still holds that tumour, so quality control (Eq. 5) kept it. proportion: P of Eq. 4,
    NaN where nobody judged. organ, size_class: of the tumour, empty where nothing was painted.
    """
    if painted is None:
        return {"painted": False, "passed": False, "proportion": math.nan, "organ": "", "size_class": ""}
    return {
        "painted": True,
        "passed": painted.passed,
        "proportion": painted.proportion,
        "organ": painted.organ,
        "size_class": painted.size_class,
    }


def painted_of(painting: Painting) -> Painted | None:
    """The record of a batch of one patch."""
    return painting.records()[0]
