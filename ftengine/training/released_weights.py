"""The released FreeTumor weights as checkpoints of ours, and back (reference 1.2, 1.3, 1.8).

=======  ==========================================================================================
input    ``TGAN.pt`` (G, C and S) or ``model_baseline_segmentor.pt`` (S), of abdomen or chest
does     checks every key, shape and dtype; tells the region from the shapes; renames
output   a generator's checkpoint (G and C) and a segmenter's (S), which every command takes
raises   ConfigError with the first differences
=======  ==========================================================================================

The weights stay as they are, bit for bit; what differs from ours is in the checkpoint's configuration: axes x, y, z, the first output of G
for every organ, MONAI's patch merging of that time, the released way to blend. A batch norm that always uses the statistics of a batch of
one is an instance norm, so its running statistics are dropped; export writes fresh ones. S of the chest has no class for the lung: it gets
one whose probability is 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.training.checkpoint import config_inside, load_checkpoint, publish, save_checkpoint
from ftengine.training.init_weights import plain_key
from ftengine.training.networks import NUM_CLASSIFIER_CLASSES, SynthesisUNet, build_segmenter, reverse_axes
from ftengine.training.weight_files import WeightFile, read_weights

RegionName = Literal["abdomen", "chest"]
GENERATOR_FILE, SEGMENTER_FILE = "generator.pt", "segmenter.pt"
NEVER = -1.0e4  # a logit whose softmax is 0 in float32, bfloat16 and float16
_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_RELEASED_CONFIG = {
    "generator.width": 32,
    "generator.channel": "first",
    "generator.axes": "xyz",
    "network.name": "swinunetr",
    "network.feature_size": 48,
    "network.patch_merging": "repeated",
    "network.axes": "xyz",
    "synthesis.variant": "released",
}
# label values of the region that S has an output for; outputs of G
_SEGMENTER_CLASSES: dict[RegionName, tuple[int, ...]] = {"abdomen": (0, 1, 2, 3, 4, 5, 6), "chest": (0, 2)}
_GENERATOR_OUTPUTS: dict[RegionName, int] = {"abdomen": 3, "chest": 1}
_PREFIX = "network."  # of ``ReversedAxes``


def released_config(region: RegionName) -> Config:
    """The configuration under which our networks compute what the released ones do."""
    return Config.preset(region).with_overrides(_RELEASED_CONFIG)


@dataclass(frozen=True)
class Imported:
    """What an import wrote."""

    region: RegionName
    sha256: str
    generator: Path | None
    segmenter: Path | None


def import_weights(path: str | Path, out: str | Path) -> Imported:
    """Write ``generator.pt`` and ``segmenter.pt``, whichever the file holds, into the folder ``out``.

    Raises ConfigError for a file that is not of the released layout to the last key, or where one of the two lies in ``out`` already.
    """
    file, out = read_weights(path), Path(out)
    nets = _nets_of(file)
    region = _region_of(file, nets)
    config = released_config(region)
    targets = {name: out / name for name in (GENERATOR_FILE, SEGMENTER_FILE)}
    for name, target in targets.items():
        if target.exists() and ("netG" if name == GENERATOR_FILE else "netSeg") in nets:
            raise ConfigError(f"{target}: exists already; want a new folder. Choose another --out.")
    epoch = file.rest.get("epoch")
    source = {"file": file.path.name, "sha256": file.sha256, "epoch": epoch if isinstance(epoch, int) else None}
    for name, tensors in nets.items():
        check_layout(tensors, layout_of(name, region), where=f"{file.path}: {name}")
    out.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any]
    if "netG" in nets:
        contents = {"model": _unet_from_released(nets["netG"]), "classifier": _unet_from_released(nets["netD"])}
        save_checkpoint(targets[GENERATOR_FILE], "generator", config, {**contents, "released": source})
    if "netSeg" in nets:
        classes = _SEGMENTER_CLASSES[region]
        untrained = [name for name, value in config.region.labels.items() if value not in classes]
        model = {f"{_PREFIX}{k}": v for k, v in _with_all_classes(nets["netSeg"], classes, config).items()}
        contents = {"model": model, "untrained_classes": untrained, "released": source}
        save_checkpoint(targets[SEGMENTER_FILE], "segmenter", config, contents)
    return Imported(
        region,
        file.sha256,
        targets[GENERATOR_FILE] if "netG" in nets else None,
        targets[SEGMENTER_FILE] if "netSeg" in nets else None,
    )


def export_weights(checkpoints: Sequence[Path], out: str | Path) -> tuple[RegionName, list[str]]:
    """Write checkpoints of ours in the released layout: a generator, with or without a segmenter, as TGAN.pt; a segmenter alone as a baseline.

    ``out`` ending in .safetensors is written as such. Returns the region and the networks written. Raises ConfigError for networks that the
    released code could not evaluate to the same result, for two of a kind or of two regions, and where ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another --out.")
    nets: dict[str, dict[str, torch.Tensor]] = {}
    regions: set[RegionName] = set()
    epoch = 0
    for path in checkpoints:
        document = load_checkpoint(path)
        region, exported = _exported(path, document)
        for name, tensors in exported.items():
            if name in nets:
                raise ConfigError(f"{path}: is the second {document['kind']}; want at most one of each.")
            layout = layout_of(name, region)
            check_layout(tensors, layout, where=f"{path}: {name}")
            nets[name] = {key: tensors[key] for key in layout}
        regions.add(region)
        epoch = max(epoch, int((document.get("released") or {}).get("epoch") or 0))
    if len(regions) != 1:
        raise ConfigError(
            f"{', '.join(map(str, checkpoints))}: are of {sorted(regions)}; want checkpoints of one region."
        )
    with_prefix = list(nets) != ["netSeg"]
    state = {
        f"{name}.{key}" if with_prefix else key: value.contiguous()
        for name, tensors in nets.items()
        for key, value in tensors.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        data = save_safetensors(state, {"epoch": str(epoch)})
        publish(out, lambda stream: stream.write(data))
    else:
        publish(out, lambda stream: torch.save({"epoch": epoch, "state_dict": state}, stream))
    return regions.pop(), list(nets)


def _exported(path: Path, document: Mapping[str, Any]) -> tuple[RegionName, dict[str, dict[str, torch.Tensor]]]:
    config = config_inside(path, document)
    region = _exportable_region(path, document, config)
    if document["kind"] == "generator":
        unets = {"netG": document["model"], "netD": document["classifier"]}
        return region, {name: _unet_to_released(model, config) for name, model in unets.items()}
    return region, {"netSeg": _only_classes(document["model"], _SEGMENTER_CLASSES[region])}


def describe(path: str | Path) -> dict[str, Any]:
    """What a file of weights is, as plain values: kind, SHA-256, tensors (shape, dtype), parameters, and what is known of its training."""
    file = read_weights(path)
    known: dict[str, Any] = {"file": str(file.path), "sha256": file.sha256}
    if "format" in file.rest and "kind" in file.rest:
        config = file.rest.get("config") or {}
        known |= {
            "kind": f"ftengine {file.rest['kind']}",
            "engine_version": file.rest.get("engine_version"),
            "region": config.get("region", {}).get("name"),
            "labels": config.get("region", {}).get("labels"),
            "network": config.get("generator" if file.rest["kind"] == "generator" else "network"),
            "steps": file.rest.get("step"),
            "trained_on": file.rest.get("identity") or file.rest.get("released"),
        }
        if file.rest.get("untrained_classes"):
            known["untrained_classes"] = file.rest["untrained_classes"]
    else:
        known |= {"kind": _kind_of_foreign(file), "epoch": file.rest.get("epoch")}
    return known | {
        "parameters": sum(v.numel() for v in file.tensors.values() if v.is_floating_point()),
        "tensors": {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in file.tensors.items()},
    }


def _kind_of_foreign(file: WeightFile) -> str:
    try:
        nets = _nets_of(file)
        return f"released, {_region_of(file, nets)}: {', '.join(nets)}"
    except ConfigError:
        return "state dict of others"


Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def layout_of(name: str, region: RegionName) -> Layout:
    """Shape and dtype of every tensor of ``netG``, ``netD`` or ``netSeg`` in the released order, without the network's prefix."""
    if name == "netSeg":
        config = released_config("abdomen")
        tensors = {k.removeprefix(_PREFIX): v for k, v in build_segmenter(config).state_dict().items()}
        tensors = _only_classes(tensors, tuple(range(len(_SEGMENTER_CLASSES[region]))))
        return {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    outputs = _GENERATOR_OUTPUTS[region] if name == "netG" else NUM_CLASSIFIER_CLASSES
    with torch.device("meta"):
        unet = SynthesisUNet(released_config(region).generator, out_channels=outputs)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    state = unet.state_dict()
    for ours, theirs in _unet_keys():
        layout[theirs] = (tuple(state[ours].shape), torch.float32)
        if theirs.endswith("bn1.bias"):
            stem, channels = theirs.removesuffix("bias"), tuple(state[ours].shape)
            layout[f"{stem}running_mean"] = layout[f"{stem}running_var"] = (channels, torch.float32)
            layout[f"{stem}num_batches_tracked"] = ((), torch.int64)
    return layout


def check_layout(tensors: Mapping[str, torch.Tensor], layout: Layout, *, where: str) -> None:
    """ConfigError where keys, shapes or dtypes are not those of the layout, with the first difference of each kind."""
    problems = []
    missing = [key for key in layout if key not in tensors]
    extra = [key for key in tensors if key not in layout]
    other = [
        f"{key} is {tuple(tensors[key].shape)} {tensors[key].dtype}, want {shape} {dtype}"
        for key, (shape, dtype) in layout.items()
        if key in tensors and (tuple(tensors[key].shape), tensors[key].dtype) != (shape, dtype)
    ]
    if missing:
        problems.append(f"{len(missing)} tensors missing, the first is {missing[0]}")
    if extra:
        problems.append(f"{len(extra)} not of that network, the first is {extra[0]}")
    if other:
        problems.append(f"{len(other)} of another shape or dtype: {other[0]}")
    if problems:
        raise ConfigError(
            f"{where}: is not the released network ({'; '.join(problems)}). Take the released file as it is; for other segmenters there is "
            "'ftengine train seg --init'."
        )


def _nets_of(file: WeightFile) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each network: of a TGAN file by prefix, of a baseline's all as ``netSeg``."""
    if "format" in file.rest and "kind" in file.rest:
        raise ConfigError(f"{file.path}: is a checkpoint of ftengine; it needs no import.")
    nets: dict[str, dict[str, torch.Tensor]] = {}
    for full_key, value in file.tensors.items():
        key = full_key.removeprefix("module.")
        name, _, rest = key.partition(".")
        if name in ("netG", "netD", "netSeg"):
            nets.setdefault(name, {})[plain_key(rest) if name == "netSeg" else rest] = value
        else:
            nets.setdefault("netSeg", {})[plain_key(key)] = value
    if ("netG" in nets) != ("netD" in nets):
        raise ConfigError(f"{file.path}: holds {', '.join(nets)}; want netG and netD together, as TGAN.pt has them.")
    return nets


def _region_of(file: WeightFile, nets: Mapping[str, Mapping[str, torch.Tensor]]) -> RegionName:
    """The region whose numbers of outputs the networks have."""
    sizes = {}
    for name, key in (("netG", "out_tr.final_conv.bias"), ("netSeg", "out.conv.conv.bias")):
        if name in nets:
            if key not in nets[name]:
                first = next(iter(nets[name]))
                raise ConfigError(
                    f"{file.path}: {name} has no {key} among its {len(nets[name])} tensors (the first is {first}); want TGAN.pt or "
                    "model_baseline_segmentor.pt. For other segmenters there is 'ftengine train seg --init'."
                )
            sizes[name] = len(nets[name][key].flatten())
    for region in ("abdomen", "chest"):
        want = {"netG": _GENERATOR_OUTPUTS[region], "netSeg": len(_SEGMENTER_CLASSES[region])}
        if all(want[name] == size for name, size in sizes.items()):
            return region
    raise ConfigError(
        f"{file.path}: has outputs {sizes}; want netG 3 and netSeg 7 (abdomen) or netG 1 and netSeg 2 (chest). A student's weights go to "
        "'ftengine train seg --init'."
    )


def _unet_keys() -> Iterator[tuple[str, str]]:
    """Names of G's and C's tensors: ours, the released one; in the released order."""

    def blocks(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        for number in (0, 1):
            for place, part in ((3 * number, "conv1"), (3 * number + 1, "bn1")):
                for kind in ("weight", "bias"):
                    yield f"{ours}.{place}.{kind}", f"{theirs}.ops.{number}.{part}.{kind}"

    for level, channels in enumerate((64, 128, 256, 512)):
        yield from blocks(f"encoder.{level}", f"down_tr{channels}")
    for level, channels in enumerate((256, 128, 64)):
        for kind in ("weight", "bias"):
            yield f"upsample.{level}.{kind}", f"up_tr{channels}.up_conv.{kind}"
        yield from blocks(f"decoder.{level}", f"up_tr{channels}")
    for kind in ("weight", "bias"):
        yield f"head.{kind}", f"out_tr.final_conv.{kind}"


def _unet_from_released(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {ours: tensors[theirs] for ours, theirs in _unet_keys()}


def _unet_to_released(model: Mapping[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """Convolutions of a network of ours, which sees z, y, x, are turned to x, y, z; fresh running statistics."""
    tensors: dict[str, torch.Tensor] = {}
    for ours, theirs in _unet_keys():
        value = model[ours]
        tensors[theirs] = reverse_axes(value) if value.ndim == 5 and config.generator.axes == "zyx" else value
        if theirs.endswith("bn1.bias"):
            stem = theirs.removesuffix("bias")
            norm = nn.BatchNorm3d(len(value))
            tensors |= {f"{stem}{name}": getattr(norm, name) for name in _BATCH_NORM_BUFFERS}
    return tensors


def _with_all_classes(
    tensors: Mapping[str, torch.Tensor], classes: tuple[int, ...], config: Config
) -> dict[str, torch.Tensor]:
    """S with an output for every label value: those it does not know never win and take no probability from the others."""
    result = dict(tensors)
    for key, value in tensors.items():
        if key.startswith("out.conv.conv.") and len(classes) != config.region.num_classes:
            rows = torch.full((config.region.num_classes, *value.shape[1:]), NEVER if key.endswith("bias") else 0.0)
            rows[list(classes)] = value
            result[key] = rows
    return result


def _only_classes(model: Mapping[str, torch.Tensor], classes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    plain = {key.removeprefix(_PREFIX): value for key, value in model.items()}
    return {k: v[list(classes)] if k.startswith("out.conv.conv.") else v for k, v in plain.items()}


def _exportable_region(path: Path, document: Mapping[str, Any], config: Config) -> RegionName:
    """The region of the released layout that a checkpoint can be written as; ConfigError for what would compute something else there."""
    region: RegionName | None = next(
        (name for name in _GENERATOR_OUTPUTS if Config.preset(name).region.organs == config.region.organs), None
    )
    if region is None:
        raise ConfigError(
            f"{path}: is of region {config.region.name}; the released layout knows abdomen and chest, as their presets have them."
        )
    wanted: dict[str, Any] = {"network.patch_merging": "repeated", "network.axes": "xyz"}
    if document["kind"] == "generator":
        wanted = {"generator.width": 32, "synthesis.variant": "released"}
        wanted |= {"generator.channel": "first"} if len(config.region.organs) > 1 else {}
    for key, want in wanted.items():
        section, name = key.split(".")
        have = getattr(getattr(config, section), name)
        if have != want:
            raise ConfigError(
                f"{path}: has {key}={have}; the released code computes with {want}. Train with --set {key}={want} to export."
            )
    unknown = [name for name, value in config.region.labels.items() if value not in _SEGMENTER_CLASSES[region]]
    if document["kind"] == "segmenter" and set(unknown) - set(document.get("untrained_classes", ())):
        raise ConfigError(
            f"{path}: was trained with the class {', '.join(unknown)}, which the released segmenter does not have."
        )
    return region
