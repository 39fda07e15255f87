"""The requests of fixed addresses, as they were when the plan read its rows one scalar at a time: they never change."""

import hashlib

import pytest

from ftengine.loader.plan import Mix, Plan
from ftengine.store.reader import Store
from ftengine.types import PatchRequest
from tests.support import make_store, small_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(
        tmp_path_factory.mktemp("golden"), small_config(), num_annotated=3, num_organs=5, shape_zyx=(70, 80, 100)
    )


def _plain(request: PatchRequest) -> tuple[object, ...]:
    drawn = request.augmentation
    return (
        request.case,
        request.dataset,
        request.annotated,
        request.row,
        *request.box.origin_zyx,
        *request.box.shape_zyx,
        drawn.transpose_yx,
        *drawn.flip_zyx,
        drawn.intensity_scale,
        drawn.intensity_shift,
    )


# (seed, class_balanced, mix, positive_fraction): case and origin of three addresses, digest of 600 requests
GOLDEN: dict[tuple[int, bool, Mix, float], tuple[list[tuple[str, int, int, int]], str]] = {
    (0, False, "mixed", 0.67): (
        [("a/0", 54, 64, 84), ("o/1", 38, 59, 69), ("o/1", 38, 42, 11)],
        "eea5239ff8b9d430966724f70665e930",
    ),
    (5, True, "mixed", 1.0): (
        [("a/2", 36, 33, 37), ("o/2", 34, 34, 64), ("o/1", 16, 32, 68)],
        "28bf8696272dd180374e15a5c3000092",
    ),
    (2**33, False, "annotated", 0.0): (
        [("a/2", 34, 63, 16), ("a/1", 16, 64, 57), ("a/0", 48, 63, 18)],
        "299f59f2e8d66bde886b597da39f4e29",
    ),
    (9, True, "annotated", 0.5): (
        [("a/2", 30, 38, 37), ("a/0", 31, 39, 43), ("a/0", 0, 22, 84)],
        "39fb312167f01e6e4181d44b61978b6a",
    ),
}


@pytest.mark.parametrize(("seed", "balanced", "mix", "positive"), list(GOLDEN))
def test_requests_are_those_of_the_first_version(
    store: Store, seed: int, balanced: bool, mix: Mix, positive: float
) -> None:
    config = small_config(
        seed=seed, training__batch_size=3, loader__class_balanced=balanced, loader__positive_fraction=positive
    )
    plan = Plan(config, store, mix=mix)
    requests = [plan.request(epoch, index) for epoch, index in ((0, 0), (0, 1), (7, 2))]
    digest = hashlib.sha256()
    for epoch in range(20):
        for index in range(30):
            digest.update(repr(_plain(plan.request(epoch, index))).encode())
    assert ([(r.case, *r.box.origin_zyx) for r in requests], digest.hexdigest()[:32]) == GOLDEN[
        seed, balanced, mix, positive
    ]
