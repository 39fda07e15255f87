"""Released weights: strict in, the released results, bit for bit out."""

from collections import OrderedDict
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from safetensors.torch import load_file

from ftengine.assemble import load_networks
from ftengine.config import Config
from ftengine.errors import ConfigError, SaveError
from ftengine.quality.judge import SegmenterJudge
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.synthesis.released import ABDOMEN_SIGMAS, CHEST_SIGMAS, TextureFields
from ftengine.training.checkpoint import load_checkpoint, load_generator, load_segmenter, save_checkpoint
from ftengine.training.networks import NUM_CLASSIFIER_CLASSES, RepeatedPatchMerging, build_generator, build_segmenter
from ftengine.training.released_weights import describe, export_weights, import_weights, layout_of, released_config
from tests.training.released import ReleasedUNet, formula_unet, key_table, random_state, shared_file

REGIONS = ("abdomen", "chest")
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module", params=REGIONS)
def tgan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A region, and a TGAN.pt of its layout."""
    region: str = request.param
    file = tmp_path_factory.mktemp(region) / "TGAN.pt"
    torch.save({"epoch": 63, "state_dict": OrderedDict(random_state(region, "netG", "netD", "netSeg"))}, file)
    return region, file


@pytest.fixture(scope="module")
def imported(tgan: tuple[str, Path]) -> tuple[str, Path, Path]:
    """A region, its TGAN.pt, and the folder of what was imported from it."""
    region, file = tgan
    out = file.parent / "imported"
    done = import_weights(file, out)
    assert (done.region, done.generator, done.segmenter) == (region, out / "generator.pt", out / "segmenter.pt")
    return region, file, out


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", ["netG", "netD", "netSeg"])
def test_the_layout_is_the_released_table(region: str, name: str) -> None:
    """Keys in their order, shapes, dtypes."""
    layout = layout_of(name, region)  # type: ignore[arg-type]  # one of the two
    ours = {f"{name}.{k}": (shape, str(dtype).removeprefix("torch.")) for k, (shape, dtype) in layout.items()}
    assert list(ours.items()) == list(key_table(region)[name].items())


def test_there_and_back_is_the_same_bit_for_bit(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    region, file, out = imported
    before = torch.load(file, weights_only=True)
    assert export_weights([out / "generator.pt", out / "segmenter.pt"], tmp_path / "TGAN.pt")[0] == region
    after = torch.load(tmp_path / "TGAN.pt", weights_only=True)
    assert after["epoch"] == before["epoch"] == 63
    assert list(after["state_dict"]) == list(before["state_dict"])
    for key, value in after["state_dict"].items():
        if key.endswith(RUNNING):
            assert torch.equal(value, torch.full_like(value, key.endswith("running_var")))
        else:
            assert torch.equal(value, before["state_dict"][key]), key


def test_a_baseline_goes_alone_and_back_as_safetensors(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    region, file, out = imported
    state = torch.load(file, weights_only=True)["state_dict"]
    baseline = {
        f"module.{k.removeprefix('netSeg.')}".replace("swinViT", "swin_vit"): v
        for k, v in state.items()
        if k.startswith("netSeg.")
    }
    torch.save({"state_dict": baseline}, tmp_path / "model_baseline_segmentor.pt")
    done = import_weights(tmp_path / "model_baseline_segmentor.pt", tmp_path / "out")
    assert done.generator is None
    assert done.segmenter is not None
    one, other = (load_checkpoint(p)["model"] for p in (done.segmenter, out / "segmenter.pt"))
    assert all(torch.equal(one[k], other[k]) for k in other)
    assert export_weights([done.segmenter], tmp_path / "S.safetensors") == (region, ["netSeg"])
    back = load_file(tmp_path / "S.safetensors")
    assert back.keys() == {k.removeprefix("netSeg.") for k in state if k.startswith("netSeg.")}
    assert all(torch.equal(v, state[f"netSeg.{k}"]) for k, v in back.items())


def test_the_golden_forward_comes_out_of_an_import(tmp_path: Path) -> None:
    """The released network's own output under weights by formula; the array is x, y, z there and z, y, x here."""
    golden = np.load(shared_file("unet_abdomen.npz"))
    state = formula_unet(float(golden["a"]), float(golden["b"]))
    torch.save({"epoch": 0, "state_dict": state | random_state("abdomen", "netD")}, tmp_path / "TGAN.pt")
    import_weights(tmp_path / "TGAN.pt", tmp_path)
    generator, config = load_generator(tmp_path / "generator.pt")
    assert config.generator.channel == "first"
    x_zyx = torch.from_numpy(np.ascontiguousarray(golden["x"].transpose(2, 1, 0)))[None, None]
    with torch.no_grad():
        y = generator(x_zyx)[0]
    expected = golden["y"][0].transpose(2, 1, 0)
    for organ in range(3):  # the first output paints every organ
        np.testing.assert_allclose(y[organ].numpy(), expected, rtol=0, atol=1e-4 * np.abs(golden["y"]).max())


def test_instance_norm_gives_what_batch_norm_gives_for_one_patch(imported: tuple[str, Path, Path]) -> None:
    """All outputs of G and C, against the network as the reference describes it, its batch norms in batch mode, on x, y, z arrays."""
    _, file, out = imported
    document = load_checkpoint(out / "generator.pt")
    config = Config.from_dict(document["config"])
    state = torch.load(file, weights_only=True)["state_dict"]
    x = torch.rand(2, 1, 16, 8, 24, generator=torch.Generator().manual_seed(3))
    outputs = {"netG": len(config.region.organs), "netD": NUM_CLASSIFIER_CLASSES}
    for name, key in (("netG", "model"), ("netD", "classifier")):
        theirs = ReleasedUNet(outputs[name])
        theirs.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        theirs.train()
        ours = build_generator(config) if name == "netG" else _classifier(config)
        ours.load_state_dict(document[key])
        with torch.no_grad():
            y = ours(x)
            expected = torch.cat([theirs(patch.permute(0, 1, 4, 3, 2)) for patch in x.split(1)]).permute(0, 1, 4, 3, 2)
        if name == "netG":
            expected = expected[:, :1].expand_as(y)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


def _classifier(config: Config) -> torch.nn.Module:
    from ftengine.training.networks import build_classifier

    return build_classifier(config)


def test_an_imported_segmenter_sees_what_the_released_one_sees(imported: tuple[str, Path, Path]) -> None:
    region, file, out = imported
    network, config = load_segmenter(out / "segmenter.pt")
    known = [0, 1, 2, 3, 4, 5, 6] if region == "abdomen" else [0, 2]
    state = torch.load(file, weights_only=True)["state_dict"]
    theirs = SwinUNETR(
        in_channels=1,
        out_channels=len(known),
        feature_size=48,
        use_v2=True,
        downsample=cast("torch.nn.Module", RepeatedPatchMerging),
    ).eval()
    theirs.load_state_dict({k.removeprefix("netSeg."): v for k, v in state.items() if k.startswith("netSeg.")})
    x = torch.rand(1, 1, 32, 32, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours = torch.softmax(network(x), dim=1)
        expected = torch.softmax(theirs(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2), dim=1)
    assert ours.shape[1] == config.region.num_classes
    torch.testing.assert_close(ours[:, known], expected, rtol=0, atol=1e-5)
    assert float(ours.sum() - ours[:, known].sum()) == 0.0  # a class it does not know takes nothing
    judge = SegmenterJudge(network, config.qc, config.region, any_tumor=True, strict=True)
    proportion, _ = judge(x, torch.ones(1, 32, 32, 64, dtype=torch.uint8), [2])
    tumors = [known.index(v) for v in config.region.tumor_values]
    predicted = expected.argmax(1)
    assert float(proportion) == pytest.approx(float(torch.isin(predicted, torch.tensor(tumors)).float().mean()))


def test_imported_chest_weights_add_a_sigmoid_and_abdomen_ones_take_away_a_tanh(
    imported: tuple[str, Path, Path],
) -> None:
    """G's output is made constant, so that the blend can be computed by hand up to the texture, whose values are positive."""
    region, _, out = imported
    generator, config = load_generator(out / "generator.pt")
    constant = {"head.weight": torch.zeros_like(generator.head.weight)}
    constant["head.bias"] = torch.full((len(config.region.organs),), -2.0)  # tanh < 0 < sigmoid: both brighten
    generator.load_state_dict(generator.state_dict() | constant)
    organ = next(iter(config.region.organs.values())).organ
    image = torch.full((1, 1, 32, 32, 32), 0.5)
    label = torch.full((1, 1, 32, 32, 32), organ, dtype=torch.uint8)
    synthesizer = Synthesizer(config.region, config.synthesis, seed=0, generator=generator)
    sigmas = ABDOMEN_SIGMAS if region == "abdomen" else CHEST_SIGMAS[:1]
    synthesizer._fields = TextureFields(0, sigmas, (48, 48, 48))
    painted = synthesizer.paint(image, label, [Address(0, 0)])
    change = (painted.image - image)[painted.mask.bool()]
    activated = float(torch.tanh(torch.tensor(-2.0)) if region == "abdomen" else torch.sigmoid(torch.tensor(-2.0)))
    sign = -1.0 if region == "abdomen" else 1.0
    texture = change / (sign * activated)
    assert float(texture.min()) >= 0
    assert 0.1 < float(texture.max()) <= 1.0


def test_released_weights_are_not_painted_by_the_papers_blend(imported: tuple[str, Path, Path]) -> None:
    region, _, out = imported
    with pytest.raises(ConfigError, match=r"Add --set synthesis\.variant=released"):
        load_networks(Config.preset(region), out / "generator.pt", out / "segmenter.pt")
    config = Config.preset(region).with_overrides({"synthesis.variant": "released", "device": "cpu"})
    generator, segmenter = load_networks(config, out / "generator.pt", out / "segmenter.pt")
    assert generator is not None
    assert segmenter is not None


def test_show_says_what_a_file_is(imported: tuple[str, Path, Path]) -> None:
    region, file, out = imported
    theirs, ours = describe(file), describe(out / "segmenter.pt")
    assert theirs["kind"] == f"released, {region}: netG, netD, netSeg"
    assert theirs["epoch"] == 63
    assert len(theirs["tensors"]) == 106 + 106 + 167
    assert theirs["tensors"]["netG.down_tr64.ops.0.conv1.weight"] == [[32, 1, 3, 3, 3], "float32"]
    assert ours["kind"] == "ftengine segmenter"
    assert ours["region"] == region
    assert ours["trained_on"] == {"file": "TGAN.pt", "sha256": theirs["sha256"], "epoch": 63}
    assert ours["parameters"] == (72_762_313 if region == "abdomen" else 72_762_117)
    assert ours.get("untrained_classes") == (None if region == "abdomen" else ["lung"])


# what is refused


def _changed(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "netG.down_tr64.ops.1.conv1.weight"
    if how == "missing":
        return {k: v for k, v in state.items() if k != key}
    if how == "extra":
        return {**state, "netG.down_tr64.ops.2.conv1.weight": state[key]}
    if how == "shape":
        return {**state, key: state[key][:, :16]}
    if how == "dtype":
        return {**state, key: state[key].half()}
    if how == "outputs":
        return {**state, "netG.out_tr.final_conv.bias": torch.zeros(5)}
    return {k: v for k, v in state.items() if not k.startswith("netD.")}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 tensors missing, the first is down_tr64\.ops\.1\.conv1\.weight"),
        ("extra", r"1 not of that network, the first is down_tr64\.ops\.2\.conv1\.weight"),
        ("shape", r"conv1\.weight is \(64, 16, 3, 3, 3\) torch\.float32, want \(64, 32, 3, 3, 3\)"),
        ("dtype", r"conv1\.weight is \(64, 32, 3, 3, 3\) torch\.float16, want"),
        ("outputs", r"has outputs \{'netG': 5\}; want netG 3 and netSeg 7 \(abdomen\)"),
        ("alone", "holds netG; want netG and netD together"),
    ],
)
def test_another_layout_is_refused_with_its_first_difference(how: str, message: str, tmp_path: Path) -> None:
    state = _changed(random_state("abdomen", "netG", "netD"), how)
    torch.save({"epoch": 0, "state_dict": state}, tmp_path / "TGAN.pt")
    with pytest.raises(ConfigError, match=message):
        import_weights(tmp_path / "TGAN.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_released_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(ConfigError, match=r"netSeg has no out\.conv\.conv\.bias among its 1 tensors"):
        import_weights(tmp_path / "foreign.pt", tmp_path / "out")
    config = released_config("chest")
    save_checkpoint(tmp_path / "ours.pt", "generator", config, {"model": {"head.bias": torch.zeros(1)}})
    with pytest.raises(ConfigError, match="is a checkpoint of ftengine; it needs no import"):
        import_weights(tmp_path / "ours.pt", tmp_path / "out")


def test_nothing_is_written_over(imported: tuple[str, Path, Path]) -> None:
    _, file, out = imported
    with pytest.raises(ConfigError, match=r"generator\.pt: exists already"):
        import_weights(file, out)
    with pytest.raises(ConfigError, match=r"TGAN\.pt: exists already"):
        export_weights([out / "generator.pt"], file)


def test_export_refuses_what_the_released_code_would_compute_otherwise(
    imported: tuple[str, Path, Path], tmp_path: Path
) -> None:
    region, _, out = imported
    narrow = Config.preset(region)
    document: dict[str, dict[str, torch.Tensor]] = {"model": {}, "classifier": {}}
    save_checkpoint(tmp_path / "narrow.pt", "generator", narrow, document)
    with pytest.raises(ConfigError, match=r"has generator\.width=8; the released code computes with 32"):
        export_weights([tmp_path / "narrow.pt"], tmp_path / "x.pt")
    plain = {"generator.width": 32, "generator.channel": "first"}
    save_checkpoint(tmp_path / "paper.pt", "generator", narrow.with_overrides(plain), document)
    with pytest.raises(ConfigError, match=r"has synthesis\.variant=paper; the released code computes with released"):
        export_weights([tmp_path / "paper.pt"], tmp_path / "x.pt")
    swin = {"network.axes": "xyz", "network.patch_merging": "all"}
    save_checkpoint(tmp_path / "s.pt", "segmenter", narrow.with_overrides(swin), {"model": {}})
    with pytest.raises(ConfigError, match=r"has network\.patch_merging=all"):
        export_weights([tmp_path / "s.pt"], tmp_path / "x.pt")
    save_checkpoint(tmp_path / "demo.pt", "generator", Config.preset("demo"), document)
    with pytest.raises(ConfigError, match="the released layout knows abdomen and chest"):
        export_weights([tmp_path / "demo.pt"], tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="is the second generator"):
        export_weights([out / "generator.pt", out / "generator.pt"], tmp_path / "x.pt")
    if region == "chest":
        save_checkpoint(tmp_path / "lung.pt", "segmenter", released_config("chest"), {"model": {}})
        with pytest.raises(ConfigError, match="was trained with the class lung"):
            export_weights([tmp_path / "lung.pt"], tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("name", ["TGAN.pt", "TGAN.safetensors"])
def test_an_export_is_on_the_disk_before_it_has_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = released_config("chest")
    contents = {"model": build_generator(config).state_dict(), "classifier": _classifier(config).state_dict()}
    save_checkpoint(tmp_path / "g.pt", "generator", config, contents)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match=r"could not be written \(No space left on device"):
        export_weights([tmp_path / "g.pt"], tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_generator_of_ours_is_exported_with_its_kernels_turned(tmp_path: Path) -> None:
    """Trained on z, y, x: the released code, on x, y, z, gets the same from it."""
    config = released_config("chest").with_overrides({"generator.axes": "zyx"})
    ours, classifier = build_generator(config).eval(), _classifier(config)
    contents = {"model": ours.state_dict(), "classifier": classifier.state_dict()}
    save_checkpoint(tmp_path / "g.pt", "generator", config, contents)
    export_weights([tmp_path / "g.pt"], tmp_path / "TGAN.pt")
    theirs = ReleasedUNet(1)
    state = torch.load(tmp_path / "TGAN.pt", weights_only=True)["state_dict"]
    theirs.load_state_dict({k.removeprefix("netG."): v for k, v in state.items() if k.startswith("netG.")})
    theirs.train()
    x = torch.rand(1, 1, 8, 16, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)


def test_the_released_classes_of_a_fresh_network_are_all_trained() -> None:
    assert build_segmenter(released_config("abdomen")).state_dict().keys() == {
        f"network.{k}" for k in layout_of("netSeg", "abdomen")
    }
