"""The reader study's bench: answers through kills of the server, at reduced size (``ftengine bench turing`` does 500 and 20)."""

import json

import pytest

from ftengine.bench import turing


def test_answers_survive_kills(capsys: pytest.CaptureFixture[str]) -> None:
    document = turing.run(answers=40, kills=2, shape_zyx=(24, 32, 32), rounds=2, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert (document["answers"], document["kept_once"]) == (40, 40)
    assert len(document["load_s"]) == 2
    with pytest.raises(SystemExit, match="want a multiple of 20"):
        turing.run(answers=30, kills=1)
