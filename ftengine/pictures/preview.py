"""``ftengine preview``: a sheet for each tumour of the first patches that can be painted."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ftengine.config import Config
from ftengine.loader.plan import Mix
from ftengine.pictures.hu_windows import WindowChoice
from ftengine.pictures.panels import DEFAULT_WIDTH_PX
from ftengine.pictures.samples import Segmenter, painted_samples
from ftengine.pictures.sheets import SheetInfo, Tile, described, draw_sample, write_contact_sheet
from ftengine.store.reader import Store
from ftengine.synthesis.bank import TumorBank
from ftengine.synthesis.engine import Generator, Judge

REGION_WINDOW = WindowChoice()


def preview(
    config: Config,
    store: Store,
    out: Path,
    *,
    num_sheets: int,
    per_size: bool = False,
    generator: Generator | None = None,
    judge: Judge | None = None,
    segmenter: Segmenter | None = None,
    bank: TumorBank | None = None,
    mix: Mix = "mixed",
    split: str | None = None,
    window: WindowChoice = REGION_WINDOW,
    contact: bool = False,
    on_sheet: Callable[[SheetInfo], None] = lambda _sheet: None,
    width_px: int = DEFAULT_WIDTH_PX,
) -> list[SheetInfo]:
    """Draw ``out/sheet-000.png`` and following: patches of ``painted_samples``, a sheet a tumour.

    A sheet has three planes through the tumour and the columns original, mask outline, synthetic, difference in HU and, with ``segmenter``,
    that network's prediction. Sheets of a patch's further tumours are named ``sheet-000-tumor-2.png``; with ``per_size``, sheets are
    ``sheet-SIZE-000.png`` and come back by size class. contact: also draw ``out/contact.png``, all tumours side by side.

    Arguments beside these as ``painted_samples`` takes them. window: of the grey pictures. on_sheet: called after each sheet. width_px:
    width of the PNGs. Raises ConfigError as ``painted_samples`` does.
    """
    sheets: list[SheetInfo] = []
    tiles: list[Tile] = []
    num_of: Counter[str] = Counter()
    for sample in painted_samples(
        config,
        store,
        num_patches=num_sheets,
        per_size=per_size,
        generator=generator,
        judge=judge,
        segmenter=segmenter,
        bank=bank,
        mix=mix,
        split=split,
    ):
        kind = sample.painted.size_class if per_size else ""
        stem = "-".join(["sheet", *([_file_part(kind)] if kind else []), f"{num_of[kind]:03d}"])
        num_of[kind] += 1
        for info, mask in described(config, sample, out / f"{stem}.png"):
            draw_sample(config, sample, info, mask, window, width_px)
            sheets.append(info)
            if contact:
                tiles.append(Tile.of(config, sample, info, mask, window))
            on_sheet(info)
    if contact:
        write_contact_sheet(
            out / "contact.png", sorted(tiles, key=lambda t: _size_order(config, t.info)), width_px=width_px
        )
    return sorted(sheets, key=lambda info: _size_order(config, info)) if per_size else sheets


def _size_order(config: Config, info: SheetInfo) -> int:
    names = list(config.synthesis.sizes)
    return names.index(info.size_class) if info.size_class in names else len(names)


def _file_part(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name) or "_"
