"""Paint tumours on a batch: draw, place, texture, Eq. 1, quality control, Eq. 5. The one obvious way, for every caller.

``Synthesizer.place`` and ``Synthesizer.blend`` are the differentiable core that generator training uses; ``Synthesizer.paint`` adds
the judge and gives the batch that segmentation training sees.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ftengine.config import RegionConfig, SynthesisConfig
from ftengine.errors import ConfigError
from ftengine.geometry import FloatZYX, IntZYX, int_zyx, mm_to_vox
from ftengine.kernels import choose_center, gaussian_blur, masked_blend, tumor_mask_and_box, upload
from ftengine.synthesis.bank import TumorBank, edge_reach_vox, require_bank
from ftengine.synthesis.box import Regions, box_shape, choose_regions, margin_for
from ftengine.synthesis.center import choose_center_released, margin_vox
from ftengine.synthesis.painting import Canvas, Painting, Verdicts, take_rows
from ftengine.synthesis.paste import paste_tumors
from ftengine.synthesis.released import ABDOMEN_SIGMAS, CHEST_SIGMAS, TextureFields, released_blend
from ftengine.synthesis.rows import count_voxels, mean_inside, voxels_of_value
from ftengine.synthesis.shape import PatchDraw, count_labels, draw_patch, organs_in_patch
from ftengine.synthesis.style import restyle
from ftengine.synthesis.syntumor import noise_fields, syntumor_texture

_SATURATED = 20.0  # its tanh is 1 in float32: what is painted without a contrast to be scaled


class _Buffers(threading.local):
    """Tensors of each thread that are kept from batch to batch."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, *, fill: float = 0.0) -> torch.Tensor:
        """A tensor like ``like``; holds what the last user left, at first ``fill``. On a GPU for one stream a thread."""
        kept = self._kept.get(name)
        if (
            kept is None
            or (kept.dtype, kept.device) != (like.dtype, like.device)
            or kept.shape[1:] != like.shape[1:]
            or len(kept) < len(like)
        ):
            kept = self._kept[name] = torch.full_like(like, fill, memory_format=torch.contiguous_format)
        return kept[: len(like)]


@dataclass(frozen=True)
class _EllipsoidTable:
    """The ellipsoids of R patches as the kernel takes them; patches with fewer are filled up with radii of 0.

    offset_zyx: int64 [R, E, 3] from the tumour's centre; tumor: int64 [R, E], whose ellipsoid it is; radii_zyx: float64 [R, E, 3] and
    warp: float64 [R, E, 3, 2, 3, 3], in voxels.
    """

    offset_zyx: NDArray[np.int64]
    tumor: NDArray[np.int64]
    radii_zyx: NDArray[np.float64]
    warp: NDArray[np.float64]
    is_more_than_tumors: bool

    @classmethod
    def of(cls, draws: Sequence[PatchDraw]) -> "_EllipsoidTable":
        rows = [[(n, e) for n, t in enumerate(d.tumors) for e in t.ellipsoids] for d in draws]
        most = max(map(len, rows), default=0)
        shape = (len(rows), most)
        offset, tumor = np.zeros((*shape, 3), dtype=np.int64), np.zeros(shape, dtype=np.int64)
        radii, warp = np.zeros((*shape, 3)), np.zeros((*shape, 3, 2, 3, 3))
        for r, row in enumerate(rows):
            for e, (number, ellipsoid) in enumerate(row):
                offset[r, e], tumor[r, e] = ellipsoid.offset_vox_zyx, number
                radii[r, e], warp[r, e] = ellipsoid.radii_vox_zyx, ellipsoid.warp
        return cls(offset, tumor, radii, warp, any(t.lobes for d in draws for t in d.tumors))


class Generator(Protocol):
    """G: float32 [B, 1, z, y, x] in [0, 1] -> [B, organs, z, y, x], before tanh; one channel an organ, in the region's order."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate G."""
        ...


class Judge(Protocol):
    """Quality control: painted image float32 [B, 1, z, y, x], mask uint8 [B, z, y, x], tumour label value of each patch."""

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor, tumor_values: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge the patches: P of Eq. 4 (float32 [B]) and whether it passes (bool [B])."""
        ...


@dataclass(frozen=True)
class Address:
    """The place of a patch in a run; its tumour is a function of (seed, epoch, index)."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Placement:
    """Tumours drawn for some patches of a batch.

    rows: the patches they are for. centers: int64 [R, N, 3], the voxel of each tumour; N is the most of a patch, the others repeat the
    draw 0. mask: uint8 [R, z, y, x], hard. box: int64 [R, 2, 3], the mask's first voxel and the one behind its last (copy-paste: before the
    organ cut it). organ: uint8 [R, z, y, x], the healthy tissue of the painted organ. pasted: float32 [R, z, y, x], copy-paste's
    values where tumours lie.
    """

    rows: list[int]
    draws: list[PatchDraw]
    centers: torch.Tensor
    mask: torch.Tensor
    box: torch.Tensor
    organ: torch.Tensor
    pasted: torch.Tensor | None = None


class Synthesizer:
    """Paints tumours for one region and configuration. Holds no random state: everything follows from seed and addresses."""

    def __init__(
        self,
        region: RegionConfig,
        config: SynthesisConfig,
        *,
        seed: int,
        generator: Generator | None = None,
        judge: Judge | None = None,
        retries: int = 0,
        spacing_mm_zyx: FloatZYX | None = None,
        bank: TumorBank | None = None,
    ) -> None:
        """``generator`` None: ``config.fixed_contrast`` takes the place of tanh(G(x)). ``judge`` None: every painted patch is kept.

        bank: what ``synthesizer: copy-paste`` pastes. Raises ConfigError for a generator or a bank that the synthesizer does not take, and
        for a bank that is missing, empty or of another spacing.
        """
        if generator is not None and not config.needs_generator:
            raise ConfigError(
                f"a generator with synthesis.synthesizer={config.synthesizer}, which takes none. Leave the generator (--synth) out, or set "
                "synthesis.synthesizer to freetumor."
            )
        self.region = region
        self.config = config
        self._seed = seed
        self._generator = generator
        self._judge = judge
        self._retries = retries
        self._spacing = spacing_mm_zyx or region.spacing_mm_zyx
        self._is_chest = "lung" in region.organs
        self._bank = require_bank(bank, config, self._spacing)
        self._is_syntumor = config.synthesizer == "syntumor"
        self._edge_reach = edge_reach_vox(
            config.syntumor_edge_mm[1] if self._is_syntumor else config.edge_sigma_mm, self._spacing
        )
        self._buffers = _Buffers()
        # tanh(G(x)) where no generator is: syntumor and copy-paste subtract and add what they have as it is
        self._constant = (
            _SATURATED if config.synthesizer in {"syntumor", "copy-paste"} else math.atanh(config.fixed_contrast)
        )
        self._noise = noise_fields(seed, region.patch_zyx, self._spacing)
        self._fields = TextureFields(seed, CHEST_SIGMAS if self._is_chest else ABDOMEN_SIGMAS)

    def draw(
        self,
        label: torch.Tensor,
        addresses: Sequence[Address],
        *,
        draw: int = 0,
        rows: Sequence[int] | None = None,
        label_voxels: Sequence[Sequence[int] | None] | None = None,
    ) -> dict[int, PatchDraw]:
        """Decide, for each patch of a batch (or the given rows), whether and what to paint: {row: draw}. label: uint8 [B, 1, z, y, x].

        label_voxels: of each patch of the batch the voxels of each label value (``shape.count_labels``). Where they are given the
        label is not looked at; where they are not it is copied to the host, which on a GPU waits for it.
        """
        rows = range(len(addresses)) if rows is None else rows
        counts = self._counts(label, rows, label_voxels)
        drawn = {}
        for row in rows:
            address = addresses[row]
            organs = organs_in_patch(counts[row], self.region, self.config.min_organ_voxels)
            patch_draw = draw_patch(
                organs,
                self.config,
                self._spacing,
                seed=self._seed,
                epoch=address.epoch,
                index=address.index,
                draw=draw,
                bank=self._bank,
            )
            if patch_draw is not None:
                drawn[row] = patch_draw
        return drawn

    def place(self, label: torch.Tensor, drawn: dict[int, PatchDraw]) -> Placement:
        """Choose the centres inside the organs and rasterise the masks. label: uint8 [B, 1, z, y, x]."""
        rows, draws = list(drawn), list(drawn.values())
        organ = voxels_of_value(take_rows(label, rows)[:, 0], [self.region.organs[d.organ].organ for d in draws])
        centers = self._centers(organ, draws)
        if self._bank is not None:
            tumors = [[t.pasted for t in d.tumors if t.pasted is not None] for d in draws]
            relative = self.config.paste == "contrast"
            pasted = paste_tumors(tumors, centers, organ, self.region.window_hu, relative=relative)
            return Placement(rows, draws, centers, pasted.mask, pasted.box, organ, pasted.values)
        table = _EllipsoidTable.of(draws)
        placed = centers
        if table.is_more_than_tumors:
            offset, tumor = (upload(t, organ.device) for t in (table.offset_zyx, table.tumor))
            placed = centers.gather(1, tumor.unsqueeze(2).expand(-1, -1, 3)) + offset
        shape = (organ.shape[1], organ.shape[2], organ.shape[3])
        mask, box = tumor_mask_and_box(placed, table.radii_zyx, table.warp, shape, organ)
        return Placement(rows, draws, centers, mask, box, organ)

    def difference(self, x: torch.Tensor, placement: Placement) -> torch.Tensor:
        """G(x) before its activation, on the channel of each patch's organ: float32 [R, z, y, x]. x: [R, 1, z, y, x]."""
        if self._generator is None:
            return torch.full_like(x[:, 0], self._constant)
        return self._evaluate(self._generator, x, [d.organ for d in placement.draws])

    def blend(self, x: torch.Tensor, g: torch.Tensor, placement: Placement, *, in_place: bool = False) -> torch.Tensor:
        """Eq. 1 with the drawn textures: float32 [R, z, y, x]; differentiable in ``g``. x, g: [R, z, y, x].

        in_place: paint into ``x``, with buffers that are kept from call to call; no gradients then. A fresh tensor of this size costs
        more than a small tumour. (The released variant makes a new tensor all the same.) Synthesisers that take no generator are handed
        the g that ``difference`` gives.
        """
        if self.config.variant == "released":
            return self._blend_released(x, g, placement)
        draws = placement.draws
        mask, box = self._with_edge(placement, x, in_place=in_place)
        sign = -1
        if placement.pasted is not None:
            sign, texture = 1, self._pasted_difference(x, placement, in_place=in_place)
        elif self._is_syntumor:
            shape = int_zyx(x.shape[1:])
            fields = self._noise.crops([d.texture_draw for d in draws], shape, x.device)
            texture = syntumor_texture(fields, [d.syntumor_contrast_hu for d in draws], self._width_hu)
        else:
            texture = self._texture(x, g, placement, box, in_place=in_place)
        return masked_blend(x, g, texture, mask, sign=sign, organ=placement.organ, box=box, out=x if in_place else None)

    @property
    def _width_hu(self) -> float:
        return self.region.window_hu[1] - self.region.window_hu[0]

    def _with_edge(
        self, placement: Placement, like: torch.Tensor, *, in_place: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask with its soft edge, where there is one, and the box around that: it fades inside the organ and into M, no further."""
        mask, box = placement.mask, placement.box
        if not any(self._edge_reach):
            return mask, box
        sigmas = [d.syntumor_edge_mm if self._is_syntumor else self.config.edge_sigma_mm for d in placement.draws]
        reach = np.array(self._edge_reach, dtype=np.int64)
        box = box + upload(np.stack([-reach, reach]), box.device)
        out = self._buffers.take("mask", like) if in_place else None
        return gaussian_blur(mask, [mm_to_vox(s, self._spacing) for s in sigmas], box=box, out=out), box

    def _texture(
        self, x: torch.Tensor, g: torch.Tensor, placement: Placement, box: torch.Tensor, *, in_place: bool
    ) -> torch.Tensor:
        """g(x) of Eq. 1, times the contrast factor and what the style makes of it. x, g: [R, z, y, x]; box: of all that is painted."""
        draws = placement.draws
        texture = gaussian_blur(
            x,
            [mm_to_vox(d.texture_sigma_mm, self._spacing) for d in draws],
            box=box,
            out=self._buffers.take("texture", x) if in_place else None,
        )
        factors = np.array([d.contrast_factor for d in draws], dtype=np.float32)
        if (factors != 1).any():
            texture = texture.mul_(upload(factors, x.device).view(-1, 1, 1, 1))
        if not self.config.diverse_keys:
            return texture
        fields = None
        if self.config.heterogeneity[1] > 0:
            fields = [self._noise.crop(d.texture_draw, int_zyx(x.shape[1:]), x.device) for d in draws]
        return restyle(
            texture,
            g,
            placement.mask,
            box,
            [d.style for d in draws],
            fields=fields,
            width_hu=self._width_hu,
            spacing_mm_zyx=self._spacing,
        )

    def _pasted_difference(self, x: torch.Tensor, placement: Placement, *, in_place: bool) -> torch.Tensor:
        """What turns the tissue into the pasted tumour, [R, z, y, x]: the tumour itself, or its contrast on top of the mean tissue in M."""
        assert placement.pasted is not None  # noqa: S101 - asked for pasted tumours only
        buffer = self._buffers.take("texture", x) if in_place else torch.empty_like(x)
        difference = torch.sub(placement.pasted, x, out=buffer)
        if self.config.paste == "absolute":
            return difference
        return difference.add_(mean_inside(x, placement.mask, placement.box).view(-1, 1, 1, 1))

    def paint(
        self,
        image: torch.Tensor,
        label: torch.Tensor,
        addresses: Sequence[Address],
        *,
        label_voxels: Sequence[Sequence[int] | None] | None = None,
    ) -> Painting:
        """Paint every eligible patch of a batch, judge it, and give failed ones back as they were (Eq. 5).

        image: float32 [B, 1, z, y, x] in [0, 1]; label: uint8 [B, 1, z, y, x]; label_voxels as ``draw`` takes them. The inputs are not
        changed. A patch is eligible when it holds at least ``min_organ_voxels`` of an organ and no labelled tumour. The label inside an
        accepted M becomes the organ's tumour class. A failed patch is drawn again up to ``retries`` times; G, which never sees M, runs
        once for all draws. With ``box: auto`` G and the judge look at boxes (``synthesis.box``), and G runs for each draw in a box.

        On a GPU, with ``label_voxels``, everything is queued on the current stream and nothing is waited for: ``Painting.records`` does.
        With ``retries`` each further draw first waits for the verdicts of the one before it. Variant released chooses its centres on the
        host and waits for the organs.
        """
        with torch.no_grad():
            counts = list(self._counts(label, range(len(addresses)), label_voxels).values())
            canvas = Canvas(image, label)
            known: dict[int, torch.Tensor] = {}
            verdicts: list[Verdicts] = []
            pending = self.draw(label, addresses, label_voxels=counts)
            for number in range(self._retries + 1):
                if not pending:
                    break
                placement = self.place(label, pending)
                verdicts.append(self._paint_once(canvas, placement, number, known))
                if number < self._retries:
                    failed = verdicts[-1].failed()
                    pending = self.draw(label, addresses, draw=number + 1, rows=failed, label_voxels=counts)
            return Painting(*canvas.finished(), verdicts)

    def _paint_once(
        self, canvas: Canvas, placement: Placement, number: int, known: dict[int, torch.Tensor]
    ) -> Verdicts:
        """One draw: Eq. 1, the judge, and what passes onto the canvas. known: G of whole patches by row, from earlier draws too."""
        regions = self._regions(placement)
        x = canvas.copy_of(placement.rows)
        painted = self.blend(x, self._contrast(x, placement, regions, known), placement, in_place=True)
        tumor_values = [self.region.organs[d.organ].tumor for d in placement.draws]
        num_voxels = count_voxels(placement.mask)
        passed = num_voxels > 0
        if self._judge is None:
            proportion = torch.full(passed.shape, float("nan"), device=passed.device)
            canvas.write(placement.rows, painted, placement.mask, placement.box, tumor_values, None)
        else:
            proportion, verdict = _judge_regions(self._judge, painted, placement.mask, tumor_values, regions)
            passed = passed & verdict
            canvas.write(placement.rows, painted, placement.mask, placement.box, tumor_values, passed)
        return Verdicts.of(
            placement.rows,
            placement.draws,
            number,
            proportion=proportion,
            passed=passed,
            num_voxels=num_voxels,
            centers=placement.centers,
        )

    def box_of(self, draw: PatchDraw, patch_zyx: IntZYX) -> IntZYX | None:
        """The shape of the box that G and S look at where a patch is painted like this; None for the whole patch."""
        if self.config.box == "full":
            return None
        margin = margin_for(self.config.box_context_mm, self._edge_reach, self._spacing)
        return box_shape(draw, patch_zyx, margin, self.config.box_least_vox)

    def _regions(self, placement: Placement) -> Regions:
        """Where G and S look."""
        patch_zyx = int_zyx(placement.mask.shape[1:])
        shapes = [self.box_of(d, patch_zyx) for d in placement.draws]
        return choose_regions(placement.draws, shapes, placement.centers, patch_zyx)

    def _contrast(
        self, x: torch.Tensor, placement: Placement, regions: Regions, known: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """G(x) before its activation, [R, z, y, x]: right where the regions are, any number elsewhere. x: [R, z, y, x]."""
        if self._generator is None:
            return self._buffers.take("contrast", x, fill=self._constant)
        organs = [d.organ for d in placement.draws]
        new = [i for i in regions.whole if placement.rows[i] not in known]
        if new:
            evaluated = self._evaluate(self._generator, take_rows(x, new).unsqueeze(1), [organs[i] for i in new])
            known.update(zip((placement.rows[i] for i in new), evaluated, strict=True))
            if len(new) == len(x):
                return evaluated
        g = self._buffers.take("difference", x)
        for i in regions.whole:
            g[i].copy_(known[placement.rows[i]])
        for boxes in regions.boxes:
            inside = boxes.crop(x).unsqueeze(1)
            boxes.paste(g, self._evaluate(self._generator, inside, [organs[i] for i in boxes.members]))
        return g

    def _counts(
        self, label: torch.Tensor, rows: Sequence[int], given: Sequence[Sequence[int] | None] | None
    ) -> dict[int, Sequence[int]]:
        """The voxels of each label value of the given rows, counted from the label where they are not known."""
        known = [None] * len(label) if given is None else given
        unknown = [row for row in rows if known[row] is None]
        counted = (
            dict(zip(unknown, (count_labels(v) for v in take_rows(label, unknown).cpu().numpy()), strict=True))
            if unknown
            else {}
        )
        return {row: counted[row] if (voxels := known[row]) is None else voxels for row in rows}

    def _evaluate(self, generator: Generator, x: torch.Tensor, organs: Sequence[str]) -> torch.Tensor:
        """G's output on the channel of each patch's organ, float32 [R, z, y, x]. x: [R, 1, z, y, x]."""
        output = generator(x).to(x.dtype)
        if output.shape[1] != len(self.region.organs) and self.config.variant != "released":
            raise ConfigError(
                f"the generator gives {output.shape[1]} channels; region {self.region.name} has the organs {', '.join(self.region.organs)}, "
                "want one channel each. Use a generator that was trained for this region."
            )
        if (
            self.config.variant == "released"
        ):  # renamed to label 1 before the channel is picked: always channel 0 (reference 1.6 #12)
            return output[:, 0].contiguous()
        return torch.stack([output[i, self.region.organ_channel[organ]] for i, organ in enumerate(organs)])

    def _centers(self, organ: torch.Tensor, draws: Sequence[PatchDraw]) -> torch.Tensor:
        """A voxel for each tumour, int64 [R, N, 3], on the organ's device; only the released law asks the host for it."""
        if self.config.variant == "released":
            host_organ = organ.cpu().numpy().astype(bool)
            rows = [
                [choose_center_released(o, t.center_draw) for t in d.tumors]
                for o, d in zip(host_organ, draws, strict=True)
            ]
            return upload(np.array(rows, dtype=np.int64), organ.device)
        margin = margin_vox(self.config.center_margin_mm, self._spacing)
        most = max((len(d.tumors) for d in draws), default=0)
        center_draws = np.zeros((len(draws), most))
        for row, draw in enumerate(draws):
            center_draws[row, : len(draw.tumors)] = [t.center_draw[0] for t in draw.tumors]
        return choose_center(organ, margin, center_draws)

    def _blend_released(self, x: torch.Tensor, g: torch.Tensor, placement: Placement) -> torch.Tensor:
        shape = (x.shape[1], x.shape[2], x.shape[3])
        texture = self._fields.crops([d.texture_draw for d in placement.draws], shape, x.device)
        soft = gaussian_blur(placement.mask.to(x.dtype), [(d.edge_sigma_vox,) * 3 for d in placement.draws])
        activated = torch.sigmoid(g) if self._is_chest and self._generator is not None else torch.tanh(g)
        sign = (
            1.0 if self._is_chest and self._generator is not None else -1.0
        )  # fixed_contrast is meant for Eq. 1's minus
        return released_blend(x, activated, placement.organ.to(x.dtype), texture, soft, sign=sign)


def _judge_regions(
    judge: Judge, painted: torch.Tensor, mask: torch.Tensor, tumor_values: list[int], regions: Regions
) -> tuple[torch.Tensor, torch.Tensor]:
    """P (float32 [R]) and verdict (bool [R]); boxes hold their masks, so P counts the same voxels there. painted, mask: [R, z, y, x]."""
    parts = []
    if regions.whole:
        rows = regions.whole
        values = [tumor_values[i] for i in rows]
        parts.append(judge(take_rows(painted, rows).unsqueeze(1), take_rows(mask, rows), values))
    for boxes in regions.boxes:
        values = [tumor_values[i] for i in boxes.members]
        parts.append(judge(boxes.crop(painted).unsqueeze(1), boxes.crop(mask), values))
    back = np.argsort(regions.order).tolist()
    proportion, passed = (torch.cat(part) for part in zip(*parts, strict=True))
    return take_rows(proportion, back), take_rows(passed, back)
