"""The released variant's texture fields: made once, cropped on their device."""

import threading
from typing import Any

import pytest
import torch

from ftengine.errors import KernelInputError
from ftengine.kernels import texture_field
from ftengine.synthesis import released
from ftengine.synthesis.released import TextureFields

SIGMAS = ((2.0, 2.0), (3.0, 2.0))


def test_crops_come_from_the_drawn_field_at_the_drawn_corner() -> None:
    fields = TextureFields(0, SIGMAS, (24, 24, 24))
    crops = fields.crops([(0.6, 0.5, 0.0, 0.99), (0.2, 0.99, 0.5, 0.0)], (8, 9, 10))
    assert crops.shape == (2, 8, 9, 10)
    assert crops.is_contiguous()
    assert torch.equal(crops[0], texture_field(0, 1, 3.0, 2.0, (24, 24, 24))[8:16, 0:9, 14:24])
    assert torch.equal(crops[1], texture_field(0, 0, 2.0, 2.0, (24, 24, 24))[16:24, 8:17, 0:10])
    assert torch.equal(fields.crop((0.6, 0.5, 0.0, 0.99), (8, 9, 10)), crops[0])


def test_no_draw_gives_no_crop() -> None:
    assert TextureFields(0, SIGMAS, (24, 24, 24)).crops([], (8, 9, 10)).shape == (0, 8, 9, 10)


def test_a_patch_larger_than_the_field_makes_it_larger() -> None:
    fields = TextureFields(0, SIGMAS, (24, 24, 24))
    assert fields.crop((0.0, 0.5, 0.5, 0.5), (8, 8, 8)).shape == (8, 8, 8)
    assert fields.crop((0.0, 0.5, 0.5, 0.5), (30, 8, 8)).shape == (30, 8, 8)


def test_a_crop_is_written_over_without_harm_to_the_field() -> None:
    fields = TextureFields(0, SIGMAS, (24, 24, 24))
    draw = (0.0, 0.5, 0.5, 0.5)
    first = fields.crops([draw], (8, 8, 8))
    kept = first.clone()
    first.zero_()
    assert torch.equal(fields.crops([draw], (8, 8, 8)), kept)


def test_threads_make_a_field_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(seed: int, number: int, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(number)
        return texture_field(seed, number, *arguments, **options)

    monkeypatch.setattr(released, "texture_field", counted)
    fields = TextureFields(0, SIGMAS, (24, 24, 24))
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(fields.crops([(0.1, 0, 0, 0), (0.9, 0, 0, 0)], (24, 24, 24))))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == [0, 1]
    assert len(found) == 6
    assert all(torch.equal(crops, found[0]) for crops in found)


def test_a_field_made_in_inference_mode_serves_training() -> None:
    fields = TextureFields(0, SIGMAS, (24, 24, 24))
    with torch.inference_mode():
        fields.crop((0.0, 0.5, 0.5, 0.5), (8, 8, 8))
    x = torch.ones((8, 8, 8), requires_grad=True)
    (x * fields.crop((0.0, 0.5, 0.5, 0.5), (8, 8, 8))).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, fields.crop((0.0, 0.5, 0.5, 0.5), (8, 8, 8)))


@pytest.mark.gpu
def test_gpu_crops_are_those_of_the_cpu_also_on_another_stream() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use")
    pytest.importorskip("cupy")
    draws = [(0.6, 0.5, 0.0, 0.99), (0.2, 0.99, 0.5, 0.0)]
    wanted = TextureFields(0, SIGMAS, (24, 24, 24)).crops(draws, (8, 9, 10))
    fields = TextureFields(0, SIGMAS, (24, 24, 24))
    maker, reader = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(maker):
        torch.cuda._sleep(100_000_000)  # cycles: the field is late
        fields.crops(draws, (8, 9, 10), "cuda")
    with torch.cuda.stream(reader):
        found = fields.crops(draws, (8, 9, 10), "cuda")
    torch.cuda.synchronize()
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # as it must be, the first time
def test_gpu_crops_can_be_captured_once_their_field_is_made() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU that torch can use")
    pytest.importorskip("cupy")
    fields, draws = TextureFields(0, SIGMAS, (24, 24, 24)), [(0.2, 0.99, 0.5, 0.0)]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(KernelInputError, match="asked for the first time while a CUDA graph is captured"):
        with torch.cuda.graph(graph):
            fields.crops(draws, (8, 9, 10), "cuda")
    wanted = fields.crops(draws, (8, 9, 10), "cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fields.crops(draws, (8, 9, 10), "cuda")
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)
