"""Checkpoint files: written whole or not at all, kept, and harmless to read whatever is in them."""

import errno
import os
import pickle
import random
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ftengine.assemble import load_painters, train_segmentation
from ftengine.config import Config
from ftengine.errors import ConfigError, SaveError
from ftengine.training import checkpoint
from ftengine.training.checkpoint import (
    load_checkpoint,
    load_generator,
    load_segmenter,
    load_weights_file,
    save_checkpoint,
    save_weights,
)
from ftengine.training.networks import build_generator, build_segmenter
from ftengine.training.weight_files import sha256_of
from tests.support import make_store, small_config

CONFIG = small_config(training__steps=2)


def _save(path: Path, step: int = 1, *, keep: int = 1) -> dict[str, Any]:
    contents = {"model": build_segmenter(CONFIG).state_dict(), "step": step, "losses": [0.5] * step}
    save_checkpoint(path, "segmenter", CONFIG, contents, keep=keep)
    return contents


def _harm(path: Path) -> Any:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {path}",)

    return Harm()


# what is written


def test_a_checkpoint_comes_back_with_versions_and_its_sha256(tmp_path: Path) -> None:
    contents = _save(tmp_path / "c.pt")
    document = load_checkpoint(tmp_path / "c.pt", "segmenter")
    assert all(torch.equal(document["model"][name], tensor) for name, tensor in contents["model"].items())
    assert (document["step"], document["losses"], document["torch_version"]) == (1, [0.5], torch.__version__)
    assert document["sha256"] == sha256_of(tmp_path / "c.pt")
    assert Config.from_dict(document["config"]) == CONFIG


def test_the_newest_checkpoints_are_kept_under_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for step in (10, 20, 30, 40):
        _save(path, step, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-20.pt", "checkpoint-30.pt", "checkpoint.pt"]
    assert [load_checkpoint(tmp_path / f"checkpoint{n}.pt")["step"] for n in ("-20", "-30", "")] == [20, 30, 40]
    _save(path, 50, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-40.pt", "checkpoint.pt"]


def test_without_hard_links_the_older_one_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    for step in (1, 2):
        _save(tmp_path / "checkpoint.pt", step, keep=2)
    assert load_checkpoint(tmp_path / "checkpoint-1.pt")["step"] == 1


def test_file_then_name_are_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append("folder" if is_folder else "file")
        assert is_folder == (tmp_path / "c.pt").exists()  # the file before it has its name, the folder after
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    _save(tmp_path / "c.pt")
    assert synced == ["file", "folder"]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, keep: int
) -> None:
    path = tmp_path / "checkpoint.pt"
    _save(path, 1, keep=keep)
    before = path.read_bytes()

    def fsync(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        SaveError, match=rf"checkpoint\.pt: could not be written \({os.strerror(number)}.*go on with --resume"
    ):
        _save(path, 2, keep=keep)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


_FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from ftengine.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.argv[0] = "ftengine"
run()
"""


def test_a_run_on_a_full_disk_stops_and_keeps_what_it_had(tmp_path: Path) -> None:
    """No file may grow beyond a limit that everything but a checkpoint stays below: a real write fails halfway."""
    config = CONFIG.with_overrides(
        {"training.steps": 9, "training.checkpoint_every": 3, "training.keep_checkpoints": 2}
    )
    store = make_store(tmp_path, config)
    out = tmp_path / "run"

    class StopError(Exception):
        pass

    def stop(step: int, _values: dict[str, float]) -> None:
        if step == 4:
            raise StopError

    with pytest.raises(StopError):
        train_segmentation(config, store.path, out, on_step=stop)
    before = (out / "checkpoint.pt").read_bytes()
    limit = len(before) - 5_000
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        _FULL,
        str(limit),
        "train",
        "seg",
        str(store.path),
        "--out",
        str(out),
        "--resume",
        "-q",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoint.pt: could not be written (File too large" in done.stderr
    assert "Nothing was lost" in done.stderr
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob(".*.partial"))
    result = train_segmentation(config, store.path, out, resume=True)
    assert result.losses == train_segmentation(config, store.path, tmp_path / "whole").losses


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.0123.partial").write_bytes(b"half")
    (tmp_path / ".other.pt.0123.partial").write_bytes(b"not ours")
    _save(tmp_path / "checkpoint.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.pt.0123.partial", "checkpoint.pt"]


# weights for others


def test_weights_are_exchanged_as_safetensors(tmp_path: Path) -> None:
    segmenter, generator = build_segmenter(CONFIG), build_generator(CONFIG)
    save_weights(tmp_path / "s.safetensors", "segmenter", CONFIG, segmenter.state_dict(), identity={})
    save_weights(tmp_path / "g.safetensors", "generator", CONFIG, generator.state_dict(), identity={})
    x = torch.rand(1, 1, 16, 16, 16)
    for load, file, network in ((load_segmenter, "s", segmenter), (load_generator, "g", generator)):
        loaded, config = load(tmp_path / f"{file}.safetensors")
        assert config == CONFIG
        assert torch.equal(loaded(x), network.eval()(x))
    weights, config = load_weights_file(tmp_path / "g.safetensors", "generator")
    assert config == CONFIG
    assert weights.keys() == generator.state_dict().keys()
    painters = load_painters(CONFIG, tmp_path / "g.safetensors", tmp_path / "s.safetensors")
    assert None not in painters
    with pytest.raises(ConfigError, match="holds a generator; want a segmenter"):
        load_segmenter(tmp_path / "g.safetensors")


def test_a_finished_run_leaves_weights_and_may_start_from_them(tmp_path: Path) -> None:
    store = make_store(tmp_path, CONFIG)
    first = train_segmentation(CONFIG, store.path, tmp_path / "a")
    weights = tmp_path / "a" / "weights.safetensors"
    trained = load_checkpoint(first.checkpoint)["model"]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in load_weights_file(weights)[0].items())
    again = CONFIG.with_overrides({"training.warmup_steps": 9, "training.steps": 1})  # the first step has rate 0
    second = train_segmentation(again, store.path, tmp_path / "b", init=weights)
    started = load_checkpoint(second.checkpoint)["model"]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in started.items())


# what is read


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _save(tmp_path / "c.pt", 5)
    return tmp_path / "c.pt"


def test_no_flipped_bit_gets_through(saved: Path, tmp_path: Path) -> None:
    good = load_checkpoint(saved)
    data, draw = saved.read_bytes(), random.Random(7)
    refused = 0
    for number in range(150):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file = tmp_path / f"{number}.pt"
        file.write_bytes(changed)
        try:
            document = load_checkpoint(file)
        except ConfigError:
            refused += 1
            continue
        # in padding, or in what an archive says twice
        assert all(torch.equal(document["model"][name], tensor) for name, tensor in good["model"].items())
        assert document["config"] == good["config"]
    assert refused > 100


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_no_part_of_a_file_is_taken_for_the_whole(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"c{suffix}"
    if suffix == ".pt":
        _save(file)
    else:
        save_weights(file, "segmenter", CONFIG, build_segmenter(CONFIG).state_dict(), identity={})
    data = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(1000, len(data), len(data) // 20), len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(ConfigError, match="is not a checkpoint of ftengine or is damaged"):
            load_checkpoint(file)


def _pickled(folder: Path, file: Path) -> None:
    file.write_bytes(pickle.dumps(_harm(folder / "harm")))


def _in_the_old_format(folder: Path, file: Path) -> None:
    torch.save({"format": 1, "model": _harm(folder / "harm")}, file, _use_new_zipfile_serialization=False)


def _in_the_archive(folder: Path, file: Path) -> None:
    torch.save({"format": 1, "kind": "segmenter", "config": {}, "model": _harm(folder / "harm")}, file)


def _whole_module(_folder: Path, file: Path) -> None:
    torch.save(build_segmenter(CONFIG), file)


def _bomb(_folder: Path, file: Path) -> None:
    """Half a gigabyte of zeros in half a megabyte."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/version", "3\n")
        with archive.open("c/data.pkl", "w", force_zip64=True) as stream:
            for _ in range(512):
                stream.write(bytes(1 << 20))


def _text(_folder: Path, file: Path) -> None:
    file.write_text("weights: none\n")


def _foreign_safetensors(_folder: Path, file: Path) -> None:
    save_file({"w": torch.zeros(3)}, file.with_suffix(".safetensors"))
    file.with_suffix(".safetensors").rename(file)


def _folder(_folder: Path, file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize(
    "make", [_pickled, _in_the_old_format, _in_the_archive, _whole_module, _bomb, _text, _folder, _foreign_safetensors]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_foreign_file_is_refused_and_not_run(tmp_path: Path, make: Callable[[Path, Path], None], suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    make(tmp_path, file)
    with pytest.raises(ConfigError, match=rf"x\{suffix}: .*want a file that 'ftengine train' wrote"):
        load_checkpoint(file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("version", ["99.0.0", "0.0.1"])
def test_another_format_says_which_version_reads_it(saved: Path, version: str) -> None:
    newer = version == "99.0.0"
    document = torch.load(saved, weights_only=True)
    torch.save({**document, "format": 7 if newer else 0, "engine_version": version}, saved)
    advice = f"Install ftengine {version} or newer" if newer else f"Use ftengine {version}, or train again"
    with pytest.raises(
        ConfigError, match=rf"checkpoint format \d of ftengine {version}; this version, .* reads format 1. {advice}"
    ):
        load_checkpoint(saved)


def test_a_newer_engine_with_new_keys_is_named(saved: Path) -> None:
    document = torch.load(saved, weights_only=True)
    document["config"]["training"]["miracle"] = True
    torch.save({**document, "engine_version": "99.0.0"}, saved)
    with pytest.raises(ConfigError, match=r"written by ftengine 99\.0\.0.*miracle.*Install ftengine 99\.0\.0 or newer"):
        load_segmenter(saved)
    torch.save(document, saved)  # of this version: somebody changed it
    with pytest.raises(ConfigError, match=r"configuration inside.*miracle: there is no such key"):
        load_segmenter(saved)


@pytest.mark.parametrize("model", [[1, 2], {"a": 1}, {"a": torch.zeros(2).to_sparse()}])
def test_a_model_that_is_no_table_of_weights_is_refused(tmp_path: Path, model: Any) -> None:
    torch.save(
        {"format": 1, "kind": "segmenter", "engine_version": "0.1.0", "config": {}, "model": model}, tmp_path / "c.pt"
    )
    with pytest.raises(ConfigError, match="its model is not a table of weights"):
        load_checkpoint(tmp_path / "c.pt")


def test_the_module_lists_no_way_to_run_a_pickle() -> None:
    """Every torch.load of ftengine says weights_only, and nothing unpickles by itself."""
    root = Path(checkpoint.__file__).parents[2]
    for folder in ("ftengine", "cli", "bench"):
        for file in (root / folder).rglob("*.py"):
            source = file.read_text()
            loads = source.count("torch.load(")
            assert source.count("weights_only=True") >= loads, file
            assert "pickle.load" not in source, file


def test_a_run_that_keeps_one_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5000.pt").write_bytes(b"mine")
    for step in (1, 2):
        _save(tmp_path / "checkpoint.pt", step, keep=1)
    assert (tmp_path / "checkpoint-5000.pt").read_bytes() == b"mine"
