"""Windows: by region, by organ, by name, by numbers."""

import pytest

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.pictures.hu_windows import PRESETS_HU, WindowChoice

ABDOMEN = Config.preset("abdomen").region


@pytest.mark.parametrize(
    ("asked", "organ", "hu", "text"),
    [
        ("region", "liver", (-175.0, 250.0), "window \N{MINUS SIGN}175 to 250 HU"),
        ("organ", "liver", (-45.0, 105.0), "liver window \N{MINUS SIGN}45 to 105 HU"),
        ("organ", "spleen", (-175.0, 250.0), "window \N{MINUS SIGN}175 to 250 HU"),
        ("organ", None, (-175.0, 250.0), "window \N{MINUS SIGN}175 to 250 HU"),
        ("lung", "liver", (-1350.0, 150.0), "lung window \N{MINUS SIGN}1350 to 150 HU"),
        ("-10.5:90", "liver", (-10.5, 90.0), "window \N{MINUS SIGN}10.5 to 90 HU"),
    ],
)
def test_window(asked: str, organ: str | None, hu: tuple[float, float], text: str) -> None:
    window = WindowChoice(asked).of(ABDOMEN, organ)
    assert window.hu == hu
    assert str(window) == text


def test_every_organ_of_the_abdomen_has_a_window() -> None:
    assert set(ABDOMEN.organs) <= set(PRESETS_HU)
    assert all(low < high for low, high in PRESETS_HU.values())


@pytest.mark.parametrize("asked", ["", "brain", "5", "90:-10", "1:1", "nan:5", "0:inf", "1:2:3", "-1e9:0"])
def test_what_is_no_window_is_refused(asked: str) -> None:
    with pytest.raises(ConfigError, match="LOW:HIGH"):
        WindowChoice(asked)
