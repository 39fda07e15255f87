"""Grey-value windows, in HU: those that radiologists read an organ with, and what a user asks for on the command line."""

from dataclasses import dataclass
from typing import NamedTuple

from ftengine.config import RegionConfig
from ftengine.errors import ConfigError


class Window(NamedTuple):
    """What is shown black (low and below) and white (high and above), in HU."""

    name: str
    low: float
    high: float

    @property
    def hu(self) -> tuple[float, float]:
        """Low and high end."""
        return self.low, self.high

    def __str__(self) -> str:
        name = f"{self.name} window" if self.name else "window"
        return f"{name} {self.low:g} to {self.high:g} HU".replace("-", "\N{MINUS SIGN}")


# usual settings, as (level, width) in textbooks: liver 30, 150 (narrow: lesions of low contrast); pancreas 40, 200; kidney 40, 350;
# abdomen (soft tissue) 40, 400; mediastinum 50, 350; lung -600, 1500; bone 400, 1800. No single source: departments differ.
PRESETS_HU: dict[str, tuple[float, float]] = {
    "liver": (-45.0, 105.0),
    "pancreas": (-60.0, 140.0),
    "kidney": (-135.0, 215.0),
    "abdomen": (-160.0, 240.0),
    "mediastinum": (-125.0, 225.0),
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
}
REGION, ORGAN = "region", "organ"


@dataclass(frozen=True)
class WindowChoice:
    """Which window a picture gets. asked: ``region``, ``organ``, a name of ``PRESETS_HU``, or ``LOW:HIGH`` in HU."""

    asked: str = REGION

    def __post_init__(self) -> None:
        """Raises ConfigError for what is none of these."""
        if self.asked not in {REGION, ORGAN, *PRESETS_HU}:
            _numbers(self.asked)

    def of(self, region: RegionConfig, organ: str | None = None) -> Window:
        """The window of a picture of ``organ``; ``organ`` without a window of its own, or None, gets that of the region."""
        if self.asked == ORGAN and organ in PRESETS_HU:
            return Window(organ, *PRESETS_HU[organ])
        if self.asked in PRESETS_HU:
            return Window(self.asked, *PRESETS_HU[self.asked])
        if self.asked in {REGION, ORGAN}:
            return Window("", *region.window_hu)
        return Window("", *_numbers(self.asked))


def _numbers(asked: str) -> tuple[float, float]:
    parts = asked.split(":")
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        low, high = 0.0, 0.0
    if not -32768 <= low < high <= 32767:
        names = ", ".join(PRESETS_HU)
        raise ConfigError(
            f"--window {asked}: want 'region', 'organ', one of {names}, or LOW:HIGH in HU with LOW below HIGH, e.g. -45:105."
        )
    return low, high
