"""lungmask: its real code with weights drawn at random, since the trained ones are a download."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.geometry import sitk_frame
from ftengine.organs.labeler import class_values, weights_hash
from ftengine.organs.run import Selection, label_store, open_labeler
from ftengine.store import index
from ftengine.store.location import Location
from ftengine.store.reader import open_store
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import ras_grid_at

CPU = torch.device("cpu")
SHAPE = (2, 40, 48)
needs_lungmask = pytest.mark.skipif(
    importlib.util.find_spec("lungmask") is None, reason="lungmask is not installed (extra organs-lungmask)"
)


def thorax() -> NDArray[np.int16]:
    """Two slices of a body with two lungs of different size: no symmetry hides a flip."""
    image = np.full(SHAPE, -1000, dtype=np.int16)
    image[:, 4:36, 4:44] = 40
    image[:, 8:30, 8:20] = -850
    image[:, 12:24, 28:40] = -820
    image[1, 26:30, 30:34] = 300
    return image


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of lungmask's network that give every class somewhere: each output is centred on what it is for this image."""
    from lungmask import LMInferer
    from lungmask.resunet import UNet

    torch.manual_seed(1)
    network = UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False)
    path = tmp_path_factory.mktemp("lungmask") / "random.pth"
    torch.save(network.state_dict(), path)
    inferer = LMInferer(modelpath=str(path), force_cpu=True, tqdm_disable=True)
    logits: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        logits.append(output)

    inferer.model.register_forward_hook(keep)
    inferer.apply(thorax()[:, ::-1, ::-1])
    state = network.state_dict()
    bias = next(name for name in reversed(state) if name.endswith("bias"))
    state[bias] -= logits[0].mean(dim=(0, 2, 3))
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Location:
    region = Config.preset("chest").region
    root = create_store(tmp_path_factory.mktemp("chest") / "s.zarr", region)
    grid = ras_grid_at(SHAPE)
    write_volume(root, "d/0", thorax(), None, grid, grid, region, Provenance("made by a test", ""))
    index.compact_index(root)
    return root


@needs_lungmask
def test_lungs_lie_where_lungmask_itself_puts_them(weights: Path, chest: Location) -> None:
    """The package turns a SimpleITK image to LPS and back by its header; our flip of the array must come to the same."""
    from lungmask import LMInferer

    store = open_store(chest)
    labeler = open_labeler("lungmask", weights, store, CPU)
    label = labeler(thorax(), store.spacing_mm_zyx)
    image = sitk.GetImageFromArray(thorax())
    frame = sitk_frame(ras_grid_at(SHAPE))
    image.SetOrigin(frame["origin"])
    image.SetSpacing(frame["spacing"])
    image.SetDirection(frame["direction"])
    found = LMInferer(modelpath=str(weights), force_cpu=True, tqdm_disable=True).apply(image)
    np.testing.assert_array_equal(label, (found > 0).astype(np.uint8))
    assert 0 < label.sum() < label.size
    for turned in (label[:, ::-1], label[:, :, ::-1], label[:, ::-1, ::-1]):
        assert not np.array_equal(label, turned)
    provenance = json.loads(labeler.provenance)
    assert (provenance["tool"], provenance["weights_sha256"]) == ("lungmask", weights_hash(weights))
    assert set(provenance["label_map"].values()) == {store.labels["lung"]}


@needs_lungmask
def test_a_chest_store_is_labelled(weights: Path, chest: Location, capsys: pytest.CaptureFixture[str]) -> None:
    labeler = open_labeler("lungmask", weights, open_store(chest), CPU)
    report = label_store(chest, labeler, Selection())
    assert (report.count("labelled"), report.exit_code) == (1, 0)
    assert capsys.readouterr().out == ""  # its log would go where our results go
    row = open_store(chest).row("d/0")
    assert row["annotation"] == "organ"
    assert json.loads(row["label_provenance"])["version"]


@needs_lungmask
def test_bad_weights_are_named(chest: Location, tmp_path: Path) -> None:
    store = open_store(chest)
    with pytest.raises(ConfigError, match=r"no\.pth: no such file; want the weights of lungmask"):
        open_labeler("lungmask", tmp_path / "no.pth", store, CPU)
    for name, content in (("text.pth", "no weights"), ("other.pth", {"x.weight": torch.zeros(2)})):
        torch.save(content, tmp_path / name)
        with pytest.raises(ConfigError, match=rf"{name}: is not a weights file of lungmask"):
            open_labeler("lungmask", tmp_path / name, store, CPU)


@pytest.mark.parametrize("tool", ["lungmask", "totalsegmentator"])
def test_a_store_with_organs_that_the_tool_does_not_know_is_refused(tool: str, tmp_path: Path) -> None:
    region = Config.preset("abdomen").region
    organs = dict(region.organs) if tool == "lungmask" else {"colon": region.organs["liver"]}
    store = open_store(create_store(tmp_path / "s.zarr", region.model_copy(update={"organs": organs})))
    missing = ", ".join(sorted(organs))
    with pytest.raises(ConfigError, match=rf"--with {tool}: finds .*also needs {missing}"):
        open_labeler(tool, tmp_path, store, CPU)


@pytest.mark.parametrize("tool", ["lungmask", "totalsegmentator"])
def test_a_package_that_is_missing_is_named(
    tool: str, chest: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    weights.touch() if tool == "lungmask" else weights.mkdir()
    for name in (tool, f"{tool}.map_tasks_config"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    for name in ("TOTALSEG_HOME_DIR", "TOTALSEG_WEIGHTS_PATH"):
        monkeypatch.setenv(name, "")  # put back afterwards
    with pytest.raises(
        ConfigError,
        match=rf"--with {tool}: its package is not installed or cannot be loaded .*ftengine\[organs-{tool}\]",
    ):
        open_labeler(tool, weights, open_store(chest), CPU)


def test_the_classes_of_other_tools_become_ours(chest: Location, tmp_path: Path) -> None:
    assert class_values("lungmask", open_store(chest)) == dict.fromkeys("12345", 1)
    lobes = class_values("totalsegmentator", open_store(chest))
    assert (len(lobes), set(lobes.values())) == (5, {1})
    abdomen = open_store(create_store(tmp_path / "s.zarr", Config.preset("abdomen").region))
    assert class_values("totalsegmentator", abdomen) == {
        "liver": 1,
        "pancreas": 3,
        "kidney_right": 5,
        "kidney_left": 5,
    }
