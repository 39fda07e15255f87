"""A store and studies, made once."""

from pathlib import Path

import pytest

from ftengine.store.reader import Store
from ftengine.turing.study import StudyFolder
from tests.support import make_store
from tests.turing.support import make_study, study_config


@pytest.fixture(scope="session")
def turing_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("turing"), study_config(), num_annotated=5, num_organs=5)


@pytest.fixture
def study(turing_store: Store, tmp_path: Path) -> StudyFolder:
    """Two readers, four cases of which two come twice, two for training."""
    return make_study(turing_store, tmp_path, repeats=2, training_cases=2)[1]
