"""What the two stages do with a batch and a step: phases, accumulation, precision, switches, overfitting."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ftengine.assemble import build_loader
from ftengine.config import Config
from ftengine.store.reader import Store
from ftengine.synthesis.engine import Address, Synthesizer
from ftengine.training import losses, synthesis
from ftengine.training.distributed import ALONE
from ftengine.training.ema import MovingAverage
from ftengine.training.learner import Learner
from ftengine.training.losses import PAINTED, REAL, Total, segmentation_loss
from ftengine.training.networks import build_classifier, build_generator, build_segmenter
from ftengine.training.run import Schedule
from ftengine.training.segmentation import Segmentation
from ftengine.training.synthesis import Adversarial
from ftengine.types import Batch
from tests.support import make_store, small_config
from tests.training.support import assert_alike, hand_made, part, recorded

CPU = torch.device("cpu")
CONFIG = small_config(device="cpu")
PAINTING = CONFIG.with_overrides(
    {
        "loader.annotated_fraction": 0.0,
        "training.batch_size": 4,
        "synthesis.fixed_contrast": 0.3,
        "synthesis.contrast_factor": (1.0, 1.0),
        "synthesis.edge_sigma_mm": 0.0,
    }
)
# three organs, each with its tumour, in patches of 16 voxels
ABDOMEN = Config.preset("abdomen").with_overrides(
    {
        "device": "cpu",
        "region.patch_zyx": (16, 16, 16),
        "network.name": "unet",
        "network.channels": (4, 8),
        "generator.width": 4,
        "synthesis.size_weights": {"tiny": 1.0},
    }
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> object:
    """The networks are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("procedures"), CONFIG)


@pytest.fixture(scope="module")
def batch(store: Store) -> Batch:
    """Six patches: annotated volumes, some with their tumour, and healthy ones."""
    found = _first_batch(store, CONFIG.with_overrides({"training.batch_size": 6}))
    assert 0 < int((found.label == 2).flatten(1).any(1).sum()) < 6
    return found


@pytest.fixture(scope="module")
def healthy(store: Store) -> Batch:
    return _first_batch(store, PAINTING)


@pytest.fixture(scope="module")
def seeing(healthy: Batch) -> nn.Module:
    """S that has learned to see tumours of one contrast."""
    stage = Segmentation(PAINTING, build_segmenter(PAINTING), CPU)
    painter = Synthesizer(PAINTING.region, PAINTING.synthesis, seed=0)
    for n in range(40):
        painting = painter.paint(healthy.image, healthy.label, [Address(1, 4 * n + i) for i in range(4)])
        stage.add(Batch(painting.image, painting.label, healthy.records))
        stage.update(2e-2)
    return stage.product


def _first_batch(store: Store, config: Config) -> Batch:
    with build_loader(config, store) as loader:
        return next(iter(loader))


def _organs() -> Batch:
    """Healthy liver, healthy pancreas, a kidney with a tumour, a pancreas with a tumour."""
    label = torch.zeros((4, 1, 16, 16, 16), dtype=torch.uint8)
    for row, organ in enumerate((1, 3, 5, 3)):
        label[row, 0, 2:14, 2:14, 2:14] = organ
    label[2, 0, 6:9, 6:9, 6:9] = 6
    label[3, 0, 6:9, 6:9, 6:9] = 4
    image = torch.rand(label.shape, generator=torch.Generator().manual_seed(0))
    return hand_made(image, label)


def _adversarial(
    config: Config, segmenter: nn.Module | None = None, kind: type[Adversarial] = Adversarial
) -> Adversarial:
    s = build_segmenter(config) if segmenter is None else copy.deepcopy(segmenter)
    return kind(config, build_generator(config), build_classifier(config), s, CPU)


# ---- accumulation


def test_the_segmentation_loss_is_a_mean_over_samples() -> None:
    """So parts of equal size give the joint batch's loss and gradients; with Dice pooled over the batch they would not."""
    logits = torch.randn((4, 3, 4, 4, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 3, (4, 1, 4, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    loss = segmentation_loss()
    one_by_one = [float(loss(logits[n : n + 1], label[n : n + 1])) for n in range(4)]
    assert float(loss(logits, label)) == pytest.approx(sum(one_by_one) / 4, rel=1e-12)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_accumulated_gradients_of_s_are_those_of_the_joint_batch(batch: Batch, clip_norm: float | None) -> None:
    config = CONFIG.with_overrides({"training.clip_norm": clip_norm})

    def updates(parts: list[Batch]) -> tuple[list[dict[str, torch.Tensor]], float]:
        stage = Segmentation(config, build_segmenter(config), CPU)
        with recorded() as gradients:
            for given in parts:
                stage.add(given)
            figures = stage.update(1e-3).figures()
        return gradients, figures["loss"]

    joint, joint_loss = updates([batch])
    parts, loss = updates([part(batch, n, n + 2) for n in (0, 2, 4)])
    assert loss == pytest.approx(joint_loss, rel=1e-6)
    assert_alike(parts, joint)
    if clip_norm is not None:
        norm = math.sqrt(sum(float(g.square().sum()) for g in parts[0].values()))
        assert norm == pytest.approx(clip_norm, rel=1e-4)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_accumulated_gradients_of_g_and_c_are_those_of_the_joint_batch(
    batch: Batch, seeing: nn.Module, form: str
) -> None:
    """Parts of unlike size, of which one has nothing to paint: means are over the samples of the step."""
    config = CONFIG.with_overrides({"generator_training.loss_form": form})
    tumors = (batch.label == 2).flatten(1).any(1).tolist()
    order = sorted(range(6), key=lambda n: tumors[n])  # healthy ones first
    rows = Batch(batch.image[order], batch.label[order], [batch.records[n] for n in order])
    healthy = tumors.count(False)

    def updates(parts: list[Batch]) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
        stage = _adversarial(config, seeing)
        with recorded() as gradients:
            for given in parts:
                stage.add(given)
            figures = stage.update(1e-3).figures()
        return gradients, figures

    joint, joint_figures = updates([rows])
    parts, figures = updates([part(rows, 0, 1), part(rows, 1, healthy), part(rows, healthy, 6)])
    assert len(joint) == 2
    assert_alike(parts, joint)
    assert figures == pytest.approx(joint_figures, rel=1e-5)


# ---- the two phases


def _check_classifier_targets(stage: Adversarial, monkeypatch: pytest.MonkeyPatch) -> None:
    """C learns "real" on all labelled tumours, "painted" on the voxels that were painted, and nothing else."""
    batch = _organs()
    asked: dict[int, list[torch.Tensor]] = {REAL: [], PAINTED: []}
    whole = losses.classified_as_loss

    def spy(logits: torch.Tensor, mask: torch.Tensor, target: int, **form: object) -> Total:
        if stage.classifier.network.head.weight.requires_grad:  # type: ignore[union-attr]  # C's phase
            asked[target].append(mask.bool())
        return whole(logits, mask, target, **form)  # type: ignore[arg-type]  # as it came

    with monkeypatch.context() as patched:
        patched.setattr(synthesis, "classified_as_loss", spy)
        stage.add(batch)
        given = stage._given[0]
        painted = given.painted
        stage.update(1e-3)
    label = batch.label[:, 0]
    assert torch.equal(asked[REAL][0], torch.isin(label[2:], torch.tensor([4, 6])))
    assert painted is not None
    assert len(painted) == 2
    changed = (painted - batch.image[:2, 0]).abs() > 0
    (mask,) = asked[PAINTED]
    assert not (changed & ~mask).any()
    assert 0 < int(mask.sum()) < 2 * 12**3 / 2  # a tiny tumour each, not the organ


def test_c_is_trained_on_real_and_painted_tumours_of_all_organs(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_classifier_targets(_adversarial(ABDOMEN), monkeypatch)


def test_raw_labels_in_the_phase_of_c_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released bug 2.1 #4: there 2 is "real" and 3, the healthy pancreas, is "painted"."""

    class RawLabels(Adversarial):
        def add(self, batch: Batch) -> None:
            super().add(batch)
            label = batch.label[:, 0]
            given = self._given[-1]
            given.real_image, given.real_mask = batch.image[2:], label[2:] == 2
            given.painted_mask = label[:2] == 3

    with pytest.raises(AssertionError):
        _check_classifier_targets(_adversarial(ABDOMEN, kind=RawLabels), monkeypatch)


def _check_gradients_of_c(batch: Batch, segmenter: nn.Module) -> None:
    """C steps with the gradients of its own loss alone, computed here from the definition."""
    stage = _adversarial(CONFIG, segmenter)
    twin = copy.deepcopy(stage.classifier.network)
    stage.add(batch)
    given = stage._given[0]
    with recorded() as gradients:
        stage.update(1e-3)
    assert given.painted is not None
    assert given.painted_mask is not None
    terms = []
    for image, mask, target in (
        (given.real_image, given.real_mask, REAL),
        (given.painted.unsqueeze(1), given.painted_mask, PAINTED),
    ):
        of_voxels = nn.functional.cross_entropy(
            twin(image), torch.full(mask.shape, target, dtype=torch.int64), reduction="none"
        )
        terms.append(torch.stack([v[m.bool()].mean() for v, m in zip(of_voxels, mask, strict=True)]).mean())
    (sum(terms) / 2).backward()  # type: ignore[union-attr]  # a tensor
    assert_alike(gradients[1:], [{name: p.grad for name, p in twin.named_parameters() if p.grad is not None}])


def test_c_steps_with_its_own_gradients(batch: Batch, seeing: nn.Module) -> None:
    _check_gradients_of_c(batch, seeing)


def test_a_classifier_that_is_not_frozen_would_be_seen(
    batch: Batch, seeing: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released bug 2.1 #5: C's step there applies the gradients of G's loss too."""
    monkeypatch.setattr(synthesis, "frozen", lambda _network: nullcontext())
    with pytest.raises(AssertionError):
        _check_gradients_of_c(batch, seeing)


def test_g_alone_moves_in_its_phase(batch: Batch, seeing: nn.Module) -> None:
    stage = _adversarial(CONFIG, seeing)
    networks = {"g": stage.generator.network, "c": stage.classifier.network, "s": stage._segmenter}
    before = {name: copy.deepcopy(n.state_dict()) for name, n in networks.items()}  # type: ignore[attr-defined]
    stage.add(batch)
    assert all(p.grad is None for p in stage.classifier.network.parameters())
    assert all(p.grad is not None for p in stage.generator.network.parameters())
    stage.update(1e-3)
    for name, network in networks.items():
        after = network.state_dict()  # type: ignore[attr-defined]
        assert all(torch.equal(after[k], v) for k, v in before[name].items()) == (name == "s")
    assert all(p.requires_grad for p in stage.classifier.network.parameters())


# ---- switches of Table A16


def test_eq_2_alone_leaves_c_as_it_is(batch: Batch, seeing: nn.Module) -> None:
    stage = _adversarial(CONFIG.with_overrides({"generator_training.losses": "seen"}), seeing)
    before = copy.deepcopy(stage.classifier.network.state_dict())
    stage.add(batch)
    figures = stage.update(1e-3).figures()
    assert {"loss_seen", "proportion", "qc/pass_rate"} <= set(figures)
    assert not {"loss_fools", "loss_classifier"} & set(figures)
    assert all(torch.equal(v, before[k]) for k, v in stage.classifier.network.state_dict().items())


def test_l_cls_alone_does_not_ask_s_for_gradients(batch: Batch, seeing: nn.Module) -> None:
    """And its gradient for G is that of L_cls, whatever S says."""

    def gradient(segmenter: nn.Module) -> dict[str, torch.Tensor]:
        stage = _adversarial(CONFIG.with_overrides({"generator_training.losses": "fools"}), segmenter)
        with recorded() as gradients:
            stage.add(batch)
            figures = stage.update(1e-3).figures()
        assert stage.main_loss == "loss_fools"
        assert "loss_seen" not in figures
        assert "proportion" in figures
        return gradients[0]

    first, second = gradient(seeing), gradient(build_segmenter(CONFIG.with_overrides({"seed": 9})))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_both_losses_are_weighted_by_lambda(batch: Batch, seeing: nn.Module) -> None:
    """Eq. 3: the gradient of both is that of Eq. 2 plus lambda times that of L_cls."""

    def gradient(**keys: object) -> dict[str, torch.Tensor]:
        stage = _adversarial(CONFIG.with_overrides({f"generator_training.{k}": v for k, v in keys.items()}), seeing)
        with recorded() as gradients:
            stage.add(batch)
            stage.update(1e-3)
        return gradients[0]

    both, seen, fools = gradient(lambda_cls=0.25), gradient(losses="seen"), gradient(losses="fools")
    assert_alike([both], [{name: seen[name] + 0.25 * fools[name] for name in seen}])


# ---- precision, moving average, schedules


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_keeps_weights_float32_and_loses_little(batch: Batch, seeing: nn.Module, precision: str) -> None:
    config = CONFIG.with_overrides({"training.precision": precision, "generator_training.precision": precision})
    batch = part(batch, 0, 2)  # fp16 is slow on the CPU
    exact, low = (Segmentation(c, build_segmenter(c), CPU) for c in (CONFIG, config))
    values = []
    for segmentation in (exact, low):
        segmentation.add(batch)
        values.append(segmentation.update(1e-3).figures()["loss"])
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], rel=0.02)
    assert all(p.dtype == torch.float32 for p in low.product.parameters())
    stage = _adversarial(config, seeing)
    stage.add(batch)
    assert math.isfinite(stage.update(1e-3).figures()["loss_seen"])
    assert bool(stage.generator.state_dict()["scaler"]) == (precision == "fp16")


def test_an_overflow_in_fp16_leaves_the_step_out_and_lowers_the_scale(batch: Batch) -> None:
    config = CONFIG.with_overrides({"training.precision": "fp16"})
    stage = Segmentation(config, build_segmenter(config), CPU)
    before = copy.deepcopy(stage.product.state_dict())
    scale = stage.learner.state_dict()["scaler"]["scale"]
    weight = next(stage.product.parameters())
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    stage.add(batch)
    stage.update(1e-3)
    assert stage.learner.state_dict()["scaler"]["scale"] == scale / 2
    assert all(torch.equal(v, before[k]) for k, v in stage.product.state_dict().items())


def test_the_moving_average_is_the_mean_that_it_says() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    average = MovingAverage(network, 0.5)
    wanted = 1.0
    for n, value in enumerate((2.0, 4.0, 8.0), start=1):
        nn.init.constant_(network.weight, value)
        average.update(network)
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * value
    assert float(average.network.weight) == pytest.approx(wanted)  # type: ignore[arg-type]  # one number
    assert not average.network.weight.requires_grad


def test_a_learner_goes_on_with_its_average_and_its_own_weights() -> None:
    def learner(network: nn.Module) -> Learner:
        optimizer = torch.optim.AdamW(network.parameters())
        return Learner(network, optimizer, device=CPU, world=ALONE, ema_decay=0.9)

    def step(given: Learner) -> None:
        given.backward(given(torch.ones(1, 3)).square().mean())
        given.update(0.1)

    first = learner(nn.Linear(3, 2))
    for _ in range(3):
        step(first)
    product, state = copy.deepcopy(first.product), copy.deepcopy(first.state_dict())
    second = learner(copy.deepcopy(product).requires_grad_())
    second.load_state_dict(state)
    step(first)
    step(second)
    for a, b in ((first.network, second.network), (first.product, second.product)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(first.network.weight, first.product.weight)  # type: ignore[arg-type]  # a linear layer


def test_a_compiled_network_keeps_its_weights_names(monkeypatch: pytest.MonkeyPatch, batch: Batch) -> None:
    asked: list[dict[str, object]] = []

    def compile_(network: nn.Module, **keys: object) -> Callable[[torch.Tensor], torch.Tensor]:
        asked.append(keys)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    config = CONFIG.with_overrides({"training.compile": True})
    stage = Segmentation(config, build_segmenter(config), CPU)
    stage.add(batch)
    stage.update(1e-3)
    assert asked == [{"dynamic": False}]
    assert set(stage.contents()["model"]) == set(build_segmenter(config).state_dict())


def test_schedules() -> None:
    cosine = Schedule(100, 2.0, 10, 1, 1)
    assert [cosine.rate(s) for s in (0, 5, 10)] == [0.0, 1.0, 2.0]
    assert cosine.rate(55) == pytest.approx(1.0)
    constant = Schedule(100, 2.0, 10, 1, 1, kind="constant")
    assert [constant.rate(s) for s in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]


def test_optimisers_are_those_of_the_configuration() -> None:
    settings = {"optimizer": "adam", "betas": (0.0, 0.999), "weight_decay": 0.0}
    stage = _adversarial(CONFIG.with_overrides({f"generator_training.{k}": v for k, v in settings.items()}))
    optimizer = stage.generator.optimizer
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == ((0.0, 0.999), 0.0)
    assert type(_adversarial(CONFIG).generator.optimizer) is torch.optim.AdamW
    config = CONFIG.with_overrides({"training.amsgrad": True})
    assert Segmentation(config, build_segmenter(config), CPU).learner.optimizer.defaults["amsgrad"]


# ---- each stage can learn


def test_s_overfits_a_batch_in_20_steps(batch: Batch) -> None:
    config = CONFIG.with_overrides({"training.clip_norm": None})
    stage = Segmentation(config, build_segmenter(config), CPU)
    values = []
    for _ in range(20):
        stage.add(batch)
        values.append(stage.update(2e-2).figures()["loss"])
    assert values[-1] < values[0] / 2


def test_g_overfits_a_batch_in_20_steps(healthy: Batch, seeing: nn.Module) -> None:
    """Eq. 2 against an S that sees tumours falls by half: G has learned what S looks for."""
    stage = _adversarial(PAINTING, seeing)
    values, figures = [], dict[str, float]()
    for _ in range(20):
        stage.add(healthy)
        figures = stage.update(1e-2).figures()
        values.append(figures["loss_seen"])
    assert values[-1] < values[0] / 2
    assert figures["proportion"] > 0.5
