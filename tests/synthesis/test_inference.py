"""How G and S are evaluated changes their rounding, not what they say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ftengine.assemble import build_judge, load_painters
from ftengine.config import Config
from ftengine.errors import ConfigError
from ftengine.synthesis.engine import Synthesizer
from ftengine.synthesis.inference import CudaGraphs, Inference, inference_dtype
from ftengine.training.checkpoint import save_checkpoint
from ftengine.training.networks import build_generator, build_segmenter
from tests.synthesis.test_painting import ADDRESSES, CONFIG, SHAPE, _batch

CPU = torch.device("cpu")
EPS = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # largest relative error of one rounding
# Rounding errors of G in standard deviations of its result. Inputs, weights, sums and norms of 15 layers are rounded: 60 roundings of
# eps / sqrt(3) are 4.5 eps; those of the image weigh 5 times as much, since its mean is 5 of its standard deviations, 4.3 eps. Together
# 6.2 eps, and twice that.
ROUNDINGS = 12.5


def _config(**synthesis: object) -> Config:
    return CONFIG.with_overrides({f"synthesis.{key}": value for key, value in synthesis.items()})


def _inference(config: Config, network: nn.Module | None = None) -> Inference:
    return Inference(network or build_generator(config).eval(), config.synthesis, CPU)


def _error(low: torch.Tensor, exact: torch.Tensor) -> float:
    return float((low.float() - exact).pow(2).mean().sqrt() / exact.std())


def test_auto_is_float32_without_a_gpu_and_names_are_taken_literally() -> None:
    assert inference_dtype(_config(precision="auto").synthesis, CPU) == torch.float32
    assert inference_dtype(_config(precision="bf16").synthesis, CPU) == torch.bfloat16
    assert inference_dtype(_config(precision="fp16").synthesis, CPU) == torch.float16


def test_the_plain_way_is_the_network_itself() -> None:
    config = _config(precision="fp32")
    image, _ = _batch()
    network = build_generator(config).eval()
    with torch.no_grad():
        wanted = network(image)
    assert torch.equal(_inference(config)(image), wanted)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_rounds_results_and_leaves_weights_alone(precision: str) -> None:
    config = _config(precision=precision)
    image, _ = _batch()
    network = build_generator(config).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        exact = network(image)
    low = _inference(config, network)(image)
    assert low.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert not torch.equal(low.float(), exact)
    assert _error(low, exact) < ROUNDINGS * EPS[precision]
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_bf16_verdicts_agree_where_p_is_not_at_the_threshold() -> None:
    image, label = _batch()
    proportions = {}
    for precision in ("fp32", "bf16"):
        config = _config(precision=precision)
        generator = _inference(config)
        judge = build_judge(config, _inference(config, build_segmenter(config).eval()))
        synthesizer = Synthesizer(config.region, config.synthesis, seed=3, generator=generator, judge=judge)
        records = [r for r in synthesizer.paint(image, label, ADDRESSES).records() if r is not None]
        proportions[precision] = [r.proportion for r in records]
        assert [r.passed for r in records] == [False, True]
    for one, other in zip(*proportions.values(), strict=True):
        assert one == pytest.approx(other, abs=0.05)


def test_channels_last_changes_the_order_in_memory_only() -> None:
    image, _ = _batch()
    plain, turned = _inference(_config()), _inference(_config(channels_last=True))
    kernels = [p for p in turned.network.parameters() if p.ndim == 5 and p.shape[1] > 1 and p.shape[2] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) and not p.is_contiguous() for p in kernels)
    assert kernels
    wanted, got = plain(image), turned(image)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    labels = _batch()[1]
    paintings = [
        Synthesizer(CONFIG.region, CONFIG.synthesis, seed=3, generator=network).paint(image, labels, ADDRESSES)
        for network in (plain, turned)
    ]
    torch.testing.assert_close(paintings[1].image, paintings[0].image, rtol=0, atol=1e-4)


def test_no_activation_is_recomputed_where_there_is_no_gradient() -> None:
    config = CONFIG.with_overrides(
        {"network.name": "swinunetr", "network.feature_size": 12, "region.patch_zyx": (64, 64, 64)}
    )
    network = build_segmenter(config).eval()
    flags = [m for m in network.modules() if hasattr(m, "use_checkpoint")]
    assert any(m.use_checkpoint for m in flags)
    Inference(network, config.synthesis, CPU)
    assert not any(m.use_checkpoint for m in flags)


def _small_network() -> nn.Module:
    """Compiles in seconds; the norm is what needs a compiler, convolutions are ready-made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.Tanh(), nn.Conv3d(4, 3, 1)).eval()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own inductor
def test_a_compiled_network_gives_a_patch_the_same_bits_in_any_batch() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler on this machine; want g++ for torch.compile on the CPU")
    image = _batch()[0][:, :, :16, :16, :16].contiguous()
    compiled, plain = _inference(_config(compile=True), _small_network()), _inference(_config(), _small_network())
    torch._dynamo.utils.counters.clear()
    together = compiled(image)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for row in range(len(image)):
        assert torch.equal(compiled(image[row : row + 1])[0], together[row])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # whatever the batch
    compiled(image[:, :, :8])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one a box size
    wanted = plain(image)
    torch.testing.assert_close(together, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_missing_compiler_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(ConfigError, match=r"No working C\+\+ compiler .* set synthesis\.compile to false"):
        _inference(_config(compile=True), _small_network())(torch.zeros((1, 1, 8, 12, 8)))


def test_checkpoints_are_loaded_for_inference(tmp_path: Path) -> None:
    config = _config(precision="bf16", channels_last=True).with_overrides({"device": "cpu"})
    save_checkpoint(tmp_path / "g.pt", "generator", config, {"model": build_generator(config).state_dict()})
    save_checkpoint(tmp_path / "s.pt", "segmenter", config, {"model": build_segmenter(config).state_dict()})
    generator, judge = load_painters(config, tmp_path / "g.pt", tmp_path / "s.pt")
    assert generator is not None
    assert judge is not None
    image, _ = _batch()
    assert generator(image[:1]).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in generator.parameters())
    mask = torch.ones((1, *SHAPE), dtype=torch.uint8)
    proportion, _ = judge(image[:1], mask, [2])
    assert proportion.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(("compiled", "graphs"), [(False, False), (False, True), (True, True)])
def test_on_a_gpu_auto_is_bf16_and_networks_run_in_other_threads(
    cuda: torch.device, *, compiled: bool, graphs: bool
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    config = _config(compile=compiled, cuda_graphs=graphs, channels_last=True)
    image, _ = _batch()
    with torch.no_grad():
        exact = build_generator(config).eval()(image)
    network = Inference(build_generator(config).eval().to(cuda), config.synthesis, cuda)

    def evaluate() -> torch.Tensor:
        with torch.cuda.stream(torch.cuda.Stream(cuda)):
            results = [network(image.to(cuda)) for _ in range(4)]  # a graph is recorded and replayed
            return torch.stack(results).cpu()

    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(evaluate).result()
    assert results.dtype == torch.bfloat16
    for result in results.float():
        assert _error(result, exact) < ROUNDINGS * EPS["bf16"]


@pytest.mark.gpu
def test_cuda_graphs_give_what_their_function_gives(cuda: torch.device) -> None:
    from concurrent.futures import ThreadPoolExecutor

    config = _config(precision="fp32")
    network = build_segmenter(config).eval().to(cuda)
    graphs = CudaGraphs(lambda x: network(x).detach())
    images = torch.rand((6, 1, *SHAPE), generator=torch.Generator().manual_seed(3)).to(cuda)
    half = SHAPE[0] // 2
    with torch.no_grad():
        wanted = [network(image[None]) for image in images]
        wanted_half = [network(image[None, :, :half]) for image in images]

    def evaluate(rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(cuda)):
            found = [(graphs(images[row : row + 1]), graphs(images[row : row + 1, :, :half])) for row in rows]
            torch.cuda.current_stream(cuda).synchronize()
        return found

    torch.cuda.synchronize(cuda)
    with ThreadPoolExecutor(2) as threads:  # while one records, the other works on the device
        for rows, found in [
            (rows, threads.submit(evaluate, rows)) for rows in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])
        ]:
            for row, (whole, part) in zip(rows, found.result(), strict=True):
                torch.testing.assert_close(whole, wanted[row], rtol=0, atol=5e-3)  # TF32
                torch.testing.assert_close(part, wanted_half[row], rtol=0, atol=5e-3)


@pytest.mark.gpu
def test_shapes_beyond_the_most_are_not_recorded(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaGraphs, "MOST_SHAPES", 2)
    calls: list[tuple[int, ...]] = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return 2 * x

    graphs = CudaGraphs(doubled)
    for _ in range(3):
        for size in (3, 4, 5):
            assert graphs(torch.ones(size, device=cuda)).tolist() == [2.0] * size
    assert calls.count((3,)) == calls.count((4,)) == 3  # twice, and while it was recorded
    assert calls.count((5,)) == 3  # each time


_LOOKS = """
import torch
from ftengine.synthesis.inference import CudaGraphs
CudaGraphs(lambda x: x * float(x.sum()))(torch.ones(4, device="cuda"))
"""


@pytest.mark.gpu
def test_a_network_that_looks_at_values_cannot_be_recorded(cuda: torch.device) -> None:
    # in a process of its own: a recording that broke off leaves torch's allocator and generators in the middle of it
    done = subprocess.run([sys.executable, "-c", _LOOKS], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot be recorded" in done.stderr
    assert "Set synthesis.cuda_graphs to false" in done.stderr
