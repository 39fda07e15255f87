"""Weights to start from: what fits is used and the rest named; nothing in a file is run."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ftengine.assemble import train_segmentation
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.training.checkpoint import load_checkpoint, save_checkpoint
from ftengine.training.init_weights import InitReport, load_initial_weights, plain_key
from ftengine.training.networks import build_segmenter
from ftengine.training.released_weights import describe, import_weights
from ftengine.training.weight_files import read_weights, sha256_of
from tests.support import make_store, small_config

SWIN = Config.preset("demo").with_overrides(
    {
        "network.name": "swinunetr",
        "network.feature_size": 12,
        "region.patch_zyx": (64, 32, 32),
        "augment.rot90_probability": 0,
    }
)
OTHER_CLASSES = SWIN.with_overrides({"seed": 1, "region.labels": {"background": 0, "liver": 1}, "region.organs": {}})
State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    """A Swin UNETR of two classes."""
    return build_segmenter(OTHER_CLASSES).state_dict()


def _load(path: Path, config: Config = SWIN) -> tuple[torch.nn.Module, InitReport]:
    network = build_segmenter(config)
    return network, load_initial_weights(network, path, config)


def _check_loaded(network: torch.nn.Module, report: InitReport, theirs: State) -> None:
    """What is reported as loaded is theirs, all else is as drawn from the seed."""
    drawn = build_segmenter(SWIN).state_dict()
    for key, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        assert torch.equal(value, theirs[key] if key in report.loaded else drawn[key]), key
    assert {*report.loaded, *report.missing} == {k for k, v in drawn.items() if v.is_floating_point()}


def _voco(state: State) -> dict[str, Any]:
    return {"state_dict": {f"module.backbone.{k.replace('swinViT', 'swin_vit')}": v for k, v in state.items()}}


def _released_student(state: State) -> dict[str, Any]:
    return {"epoch": 3, "best_acc": np.mean([0.5, 0.7]), "state_dict": dict(state), "optimizer": {"param_groups": []}}


@pytest.mark.parametrize("dress", [_voco, _released_student, dict], ids=["voco", "student", "plain"])
def test_all_but_the_output_layer_of_another_label_table_is_used(
    dress: Callable[[State], Any], theirs: State, tmp_path: Path
) -> None:
    torch.save(dress(theirs), tmp_path / "weights.pt")
    network, report = _load(tmp_path / "weights.pt")
    _check_loaded(network, report, theirs)
    assert report.missing == ("out.conv.conv.weight", "out.conv.conv.bias")
    assert report.skipped["out.conv.conv.bias"] == "shape (2,), want (3,)"
    assert set(report.skipped) == set(report.missing)
    assert "network.axes=xyz and network.patch_merging=repeated" in report.line()


def test_safetensors_are_read(theirs: State, tmp_path: Path) -> None:
    save_file(dict(theirs), tmp_path / "weights.safetensors")
    network, report = _load(tmp_path / "weights.safetensors")
    _check_loaded(network, report, theirs)


@pytest.mark.parametrize("style", ["module.", "encoder."])
def test_a_self_supervised_swin_encoder_fills_the_encoder(style: str, theirs: State, tmp_path: Path) -> None:
    """SwinSSL's two published forms: a version 1 encoder without the convolutions of version 2."""
    encoder = {
        k.removeprefix("swinViT.").replace(".mlp.linear", ".mlp.fc"): v
        for k, v in theirs.items()
        if k.startswith("swinViT.") and "c.0." not in k and v.is_floating_point()
    }
    if style == "encoder.":
        encoder = {k.replace(".0.", ".0.0.", 1) if k.startswith("layers") else k: v for k, v in encoder.items()}
    wrapper = "state_dict" if style == "module." else "model"
    foreign = {"module.rotation_head.weight": torch.zeros(4, 4)}
    torch.save({wrapper: {**{style + k: v for k, v in encoder.items()}, **foreign}}, tmp_path / "ssl.pt")
    network, report = _load(tmp_path / "ssl.pt")
    _check_loaded(network, report, theirs)
    assert len(report.loaded) == len(encoder)
    assert dict(report.skipped) == {"rotation_head.weight": "not in the network"}


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("module.backbone.swin_vit.patch_embed.proj.weight", "swinViT.patch_embed.proj.weight"),
        ("encoder.layers3.0.0.blocks.1.mlp.fc2.bias", "swinViT.layers3.0.blocks.1.mlp.linear2.bias"),
        ("layers4c.0.layer.conv1.conv.weight", "swinViT.layers4c.0.layer.conv1.conv.weight"),
        ("encoder10.layer.conv1.conv.weight", "encoder10.layer.conv1.conv.weight"),
    ],
)
def test_keys_are_renamed(key: str, plain: str) -> None:
    assert plain_key(key) == plain


def test_numpy_numbers_of_both_versions_are_read(theirs: State, tmp_path: Path) -> None:
    """The released code keeps ``best_acc`` as the result of np.mean; NumPy 1 names the same function elsewhere."""
    file = tmp_path / "student.pt"
    torch.save(_released_student(theirs), file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for module in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content.replace(b"numpy._core.multiarray\nscalar", module + b"\nscalar"))
        assert read_weights(file).rest["best_acc"] == pytest.approx(0.6)


# our own checkpoints


def test_a_run_from_weights_of_ours_says_what_became_of_them(tmp_path: Path) -> None:
    config = small_config(training__steps=2, device="cpu")
    store = make_store(tmp_path, config)
    first = train_segmentation(config, store.path, tmp_path / "a")
    said: list[str] = []
    second = train_segmentation(config, store.path, tmp_path / "b", init=first.checkpoint, warn=said.append)
    written = json.loads((tmp_path / "b" / "run.json").read_text())["init"]
    num_tensors = len(load_checkpoint(first.checkpoint)["model"])
    assert (written["loaded"], written["skipped"], written["missing"]) == (num_tensors, {}, [])
    assert len(written["sha256"]) == 64
    assert second.init == f"{first.checkpoint}: {num_tensors} tensors loaded"
    assert said == []

    specialist = {"region.labels": {"background": 0, "liver": 1, "liver_tumor": 2, "cyst": 3}}
    wider = config.with_overrides({**specialist, "loader.absent_classes": "allow"})
    with_cyst = make_store(tmp_path / "other", wider)
    third = train_segmentation(wider, with_cyst.path, tmp_path / "c", init=first.checkpoint, warn=said.append)
    assert "skipped" in third.init
    assert any(text.startswith("--init ") and "drawn anew" in text for text in said)


def test_rows_of_classes_that_a_file_never_knew_are_drawn(tmp_path: Path) -> None:
    network = build_segmenter(SWIN)
    state = {k: v + 1.0 if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_checkpoint(tmp_path / "s.pt", "segmenter", SWIN, {"model": state, "untrained_classes": ["liver"]})
    loaded, _ = _load(tmp_path / "s.pt")
    for name in ("weight", "bias"):
        key = f"out.conv.conv.{name}"
        row, drawn = loaded.state_dict()[key], network.state_dict()[key]
        assert torch.equal(row[1], drawn[1])
        assert torch.equal(row[[0, 2]], state[key][[0, 2]])


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        ({"network.patch_merging": "repeated"}, "segmenter", r"network\.patch_merging was repeated, this run has all"),
        ({"network.axes": "xyz"}, "segmenter", r"network\.axes was xyz, this run has zyx"),
        ({"network.name": "unet"}, "segmenter", r"network\.name was unet, this run has swinunetr"),
        ({}, "generator", "holds a generator; want a segmenter"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    overrides: dict[str, Any], kind: Any, message: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "s.pt", kind, SWIN.with_overrides(overrides), {"model": {"a": torch.zeros(1)}})
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path / "s.pt")


# what is refused


def test_a_network_of_which_almost_nothing_fits_is_refused(theirs: State, tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3, 3), "out.conv.conv.bias": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"fits network swinunetr in 1 of 159 tensors \(conv\.weight: not in the"):
        _load(tmp_path / "other.pt")
    wider = build_segmenter(OTHER_CLASSES.with_overrides({"network.feature_size": 24}))
    torch.save(wider.state_dict(), tmp_path / "wider.pt")
    with pytest.raises(ConfigError, match=r"swinViT\.patch_embed\.proj\.weight: shape \(24, 1, 2, 2, 2\), want \(12,"):
        _load(tmp_path / "wider.pt")
    broken = {k: torch.full_like(v, float("nan")) if v.is_floating_point() else v for k, v in theirs.items()}
    torch.save(broken, tmp_path / "nan.pt")
    with pytest.raises(ConfigError, match="holds NaN or infinity"):
        _load(tmp_path / "nan.pt")


class _Harm:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self._file}",)


class _Smuggled:
    """Something else by way of NumPy's numbers, which are allowed."""

    def __init__(self, dtype: str, content: Any) -> None:
        self._arguments = (np.dtype(dtype), content)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        reduced: Any = np.float64(1.0).__reduce__()
        return reduced[0], self._arguments


READERS: dict[str, Callable[[Path], Any]] = {
    "init": _load,
    "import": lambda path: import_weights(path, path.parent / "out"),
    "show": describe,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_cannot_run_code(reader: str, wrapped: bool, tmp_path: Path) -> None:
    harm = _Harm(tmp_path / "harm")
    file = tmp_path / "harm.pt"
    if wrapped:
        torch.save({"epoch": harm, "state_dict": {"netG.out_tr.final_conv.bias": torch.zeros(3)}}, file)
    else:
        file.write_bytes(pickle.dumps(harm, protocol=2))
    with pytest.raises(ConfigError, match=r"harm\.pt: (asks to run (posix|nt)\.system|is not a file of weights)"):
        READERS[reader](file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("smuggled", "message"),
    [(_Smuggled("O", b"anything"), "ObjectDType"), (_Smuggled("f8", [1]), "not a plain number")],
    ids=["object", "list"],
)
def test_numpy_objects_are_no_numbers(reader: str, smuggled: _Smuggled, message: str, tmp_path: Path) -> None:
    torch.save({"best_acc": smuggled, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "object.pt")
    with pytest.raises(ConfigError, match=rf"object\.pt: is not a file of weights.*{message}"):
        READERS[reader](tmp_path / "object.pt")


def _deflated(whole: Path, file: Path) -> None:
    with zipfile.ZipFile(whole) as given, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as written:
        for info in given.infolist():
            written.writestr(info.filename, given.read(info))


def _one_byte_changed(whole: Path, file: Path) -> None:
    content = bytearray(whole.read_bytes())
    content[content.index(np.full(64, 3.0, dtype="<f4").tobytes()) + 5] ^= 1  # in a tensor
    file.write_bytes(content)


def _of_old_torch(whole: Path, file: Path) -> None:
    torch.save(torch.load(whole, weights_only=True), file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_deflated, "is not a file of weights.*is compressed, which torch never does"),
        (_one_byte_changed, "is not a file of weights.*the checksum of whole/data/0 is wrong"),
        (_of_old_torch, r"is in the format of torch before 1\.6.*write it anew: python -c"),
    ],
)
def test_an_archive_is_checked_before_it_is_read(
    reader: str, make: Callable[[Path, Path], None], message: str, tmp_path: Path
) -> None:
    torch.save({"state_dict": {"out.conv.conv.bias": torch.full((64,), 3.0)}}, tmp_path / "whole.pt")
    make(tmp_path / "whole.pt", tmp_path / "made.pt")
    with pytest.raises(ConfigError, match=rf"made\.pt: {message}"):
        READERS[reader](tmp_path / "made.pt")


def test_the_advice_for_the_old_format_works(tmp_path: Path) -> None:
    torch.save({"a": torch.full((3,), 2.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError) as caught:
        read_weights(tmp_path / "old.pt")
    code = str(caught.value).split('python -c "', maxsplit=1)[1].removesuffix('"')
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    assert read_weights(tmp_path / "new.pt").tensors["a"].tolist() == [2.0, 2.0, 2.0]


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt").sha256 == sha256_of(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"has checkpoint format 2 of ftengine 7\.1\.0.*Install ftengine 7\.1\.0 or newer"),
        (
            {"config": {"telepathy": 1}},
            r"was written by ftengine 7\.1\.0, and this is .*Install ftengine 7\.1\.0 or newer",
        ),
        ({"kind": "generator"}, "holds a generator; want a segmenter"),
    ],
)
def test_a_checkpoint_of_a_newer_version_is_refused_with_the_version_to_install(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = small_config()
    document = {"format": 1, "kind": "segmenter", "engine_version": "7.1.0", "config": config.model_dump(mode="json")}
    torch.save({**document, "model": build_segmenter(config).state_dict(), **changes}, tmp_path / "new.pt")
    with pytest.raises(ConfigError, match=message):
        load_initial_weights(build_segmenter(config), tmp_path / "new.pt", config)


def test_damaged_bytes_are_always_an_error_of_ours(tmp_path: Path) -> None:
    """Bytes changed at random places of both of torch's formats: read, or refused; never another exception."""
    rng = np.random.default_rng(0)
    refused = 0
    for is_zip in (True, False):
        torch.save({"a": torch.zeros(4)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=is_zip)
        content = np.frombuffer((tmp_path / "whole.pt").read_bytes(), dtype=np.uint8)
        for _ in range(150):
            changed = content.copy()
            changed[rng.integers(len(content), size=4)] = rng.integers(256, size=4)
            (tmp_path / "changed.pt").write_bytes(changed.tobytes())
            try:
                read_weights(tmp_path / "changed.pt")
            except ConfigError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_cut_short_or_something_else_are_named(
    reader: str, suffix: str, theirs: State, tmp_path: Path
) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": dict(theirs)}, whole)
    else:
        save_file(dict(theirs), whole)
    content = whole.read_bytes()
    for name, part in (
        ("half", content[: len(content) // 2]),
        ("start", content[:100]),
        ("empty", b""),
        ("text", b"not weights at all, but a text that somebody gave by mistake\n" * 40),
    ):
        file = tmp_path / f"{name}{suffix}"
        file.write_bytes(part)
        with pytest.raises(ConfigError, match=rf"{name}\{suffix}: is not a file of weights, or is damaged or cut"):
            READERS[reader](file)
    with pytest.raises(ConfigError, match="no such file; want a file of weights"):
        READERS[reader](tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.zeros(1)], {"state_dict": {}}, {"state_dict": {"a": 1}}])
def test_a_file_without_weights_is_named(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(ConfigError, match=r"none\.pt: holds no weights"):
        _load(tmp_path / "none.pt")
