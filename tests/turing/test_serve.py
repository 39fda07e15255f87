"""The server: who is let in, what is refused, and that nothing it sends tells real from synthetic."""

import errno
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from ftengine.errors import ConfigError
from ftengine.turing.answers import Answers, Journals
from ftengine.turing.serve import MAX_BODY_BYTES, checked_hosts, make_app
from ftengine.turing.study import StudyFolder, read_key
from tests.turing.support import answer_of

BASE = "http://127.0.0.1:8000"


@pytest.fixture
def client(study: StudyFolder) -> Iterator[TestClient]:
    """Nobody has signed in."""
    journals = Journals(study, warn=pytest.fail)
    with TestClient(make_app(study, journals, warn=pytest.fail), base_url=BASE) as client:
        yield client
    journals.close()


def _sign_in(client: TestClient, study: StudyFolder, reader: int = 0) -> Any:
    response = client.post("/api/session", json={"token": study.token(study.study.readers[reader])})
    assert response.status_code == 204
    return response


def _journal_bytes(study: StudyFolder) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((study.path / "answers").iterdir()))


def test_the_page_comes_with_a_policy_that_allows_no_other_host(client: TestClient) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/app.js", "text/javascript"),
        ("/app.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
    ):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
    page = client.get("/").text
    assert "<style" not in page
    assert " style=" not in page
    assert " on" not in page.replace(" on ", "").partition("<main")[0]  # no handlers in attributes
    for text in (page, client.get("/app.js").text, client.get("/app.css").text):
        assert "//" not in text.replace("// ", "").replace("http://www.w3.org/2000/svg", "")


def test_a_link_is_exchanged_for_a_cookie_that_scripts_and_other_sites_do_not_get(
    client: TestClient, study: StudyFolder
) -> None:
    assert client.get("/api/state").status_code == 401
    cookie = _sign_in(client, study).headers["set-cookie"]
    assert f"ftengine_turing_{study.study.id}=" in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" not in cookie
    assert client.get("/api/state").json()["reader"] == {"id": "r01", "name": "Ada"}
    assert client.post("/api/leave", json={}).status_code == 204
    assert client.get("/api/state").status_code == 401


@pytest.mark.parametrize("token", ["", "x", None, 5, ["a"], "\u00e9" * 32, "A" * 32, "\ud800", "\ud800" * 32])
def test_other_tokens_are_refused(client: TestClient, token: Any) -> None:
    body = json.dumps({"token": token})  # httpx cannot send half a surrogate pair; others can
    response = client.post("/api/session", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 403
    assert "set-cookie" not in response.headers


def test_only_names_of_this_machine_and_allowed_ones_are_served(study: StudyFolder) -> None:
    journals = Journals(study, warn=pytest.fail)
    with TestClient(
        make_app(study, journals, allow_hosts=checked_hosts(["study.example"]), warn=pytest.fail), base_url=BASE
    ) as client:
        for host, status in (
            ("127.0.0.1:8000", 200),
            ("localhost", 200),
            ("[::1]:99", 200),
            ("study.example", 200),
            ("evil.example", 400),
            ("127.0.0.1.evil.example", 400),
            ("", 400),
        ):
            assert client.get("/", headers={"host": host}).status_code == status
    journals.close()
    for name in ("*", "*.example", "http://x", "a:80", "", "a/b", "-a"):
        with pytest.raises(ConfigError, match="want the plain name of a host"):
            checked_hosts([name])


@pytest.mark.parametrize(
    "path",
    [
        "/study.json",
        "/secret",
        "/../study.json",
        "/%2e%2e/study.json",
        "/api/case/../../study.json",
        "/api/case/..%2f..%2fstudy.json",
        "/api/case/%00",
        "/answers/r01.jsonl",
        "/cases/",
        "//etc/passwd",
    ],
)
def test_no_path_leads_to_another_file(client: TestClient, study: StudyFolder, path: str) -> None:
    _sign_in(client, study)
    assert client.get(path).status_code == 404


def test_a_reader_gets_the_case_that_is_due_and_the_next_alone(client: TestClient, study: StudyFolder) -> None:
    _sign_in(client, study)
    shown = study.study.readers[0].showings
    assert [client.get(f"/api/case/{s.item}").status_code for s in shown] == [200, 200, *[404] * 6]
    assert client.get(f"/api/case/{shown[0].case}").status_code == 404  # names of the study are none of the browser
    assert client.get(f"/api/case/{study.study.readers[1].showings[0].item}").status_code == 404
    assert client.get(f"/api/case/{shown[0].item}").content == study.read_case(shown[0].case)
    assert client.post("/api/answer", json=answer_of(study, 0, 0)).status_code == 201
    assert [client.get(f"/api/case/{s.item}").status_code for s in shown] == [404, 200, 200, *[404] * 5]


def test_nothing_that_is_sent_tells_real_from_synthetic(client: TestClient, study: StudyFolder) -> None:
    """All responses of a whole reading, grouped by the truth: same bytes but for the voxels, same headers, same keys."""
    truth = read_key(study.path.parent / "study.key").truth
    _sign_in(client, study)
    seen: dict[bool, set[tuple[Any, ...]]] = {True: set(), False: set()}
    for number, showing in enumerate(study.study.readers[0].showings):
        state = client.get("/api/state")
        case = client.get(f"/api/case/{showing.item}")
        answer = client.post("/api/answer", json=answer_of(study, 0, number, synthetic=False))
        told = answer.json()["truth_of_training_case"]
        assert told == (truth[showing.case].synthetic if showing.training else None)
        shape = [
            tuple(sorted((k, v) for k, v in r.headers.items() if k != "content-length" or r is case))
            for r in (state, case, answer)
        ]
        keys = (tuple(sorted(state.json())), tuple(sorted(state.json()["current"])), tuple(sorted(answer.json())))
        seen[truth[showing.case].synthetic].add((*shape, keys, len(case.content)))
        for other in (state.text, answer.text):
            assert showing.case not in other
            assert not any(t.case in other or t.store in other for t in truth.values())
    assert len(seen[True]) == 1
    assert seen[True] == seen[False]


def test_the_server_does_not_open_the_key(study: StudyFolder) -> None:
    """It serves a whole study whose key is gone."""
    (study.path.parent / "study.key").unlink()
    journals = Journals(study, warn=pytest.fail)
    with TestClient(make_app(study, journals, warn=pytest.fail), base_url=BASE) as client:
        _sign_in(client, study)
        for number in range(8):
            assert client.post("/api/answer", json=answer_of(study, 0, number)).status_code == 201
        assert client.get("/api/state").json()["current"] is None
    journals.close()


FORGED: list[tuple[dict[str, Any], int]] = [
    ({"item": "0" * 16}, 404),
    ({"item": "../../etc"}, 422),
    ({"reader": "r02"}, 403),
    ({"reader": "nobody"}, 422),
    ({"confidence": 0}, 422),
    ({"confidence": 6}, 422),
    ({"confidence": "3"}, 422),
    ({"confidence": 3.5}, 422),
    ({"confidence": True}, 422),
    ({"synthetic": "true"}, 422),
    ({"synthetic": None}, 422),
    ({"answer_id": "short"}, 422),
    ({"comment": "x" * 2001}, 422),
    ({"comment": "\ud800"}, 422),
    ({"comment": None}, 422),
    ({"click_zyx": [0, 0]}, 422),
    ({"click_zyx": [0, 0, 99]}, 422),
    ({"click_zyx": [0.5, 0, 0]}, 422),
    ({"seconds": -1}, 422),
    ({"seconds": 1e9}, 422),
    ({"truth": True}, 422),
    ({"training": False}, 422),
]


@pytest.mark.parametrize(("changes", "status"), FORGED)
def test_a_forged_answer_is_refused_and_nothing_is_written(
    client: TestClient, study: StudyFolder, changes: dict[str, Any], status: int
) -> None:
    _sign_in(client, study)
    body = json.dumps(answer_of(study, 0, 0) | changes)
    response = client.post("/api/answer", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]
    assert _journal_bytes(study) == b""


def test_bodies_that_are_no_answer_are_refused(client: TestClient, study: StudyFolder) -> None:
    _sign_in(client, study)
    good = json.dumps(answer_of(study, 0, 0))
    as_json = {"content-type": "application/json"}
    for content, headers, status in (
        (good, {"content-type": "text/plain"}, 415),
        (good, {"content-type": "application/x-www-form-urlencoded"}, 415),
        (good, as_json | {"origin": "https://evil.example"}, 403),
        (good, as_json | {"origin": "null"}, 403),
        ("", as_json, 422),
        ("[1]", as_json, 422),
        ("nul", as_json, 422),
        ("[" * 10_000, as_json, 422),
        ('{"seconds": NaN}', as_json, 422),
        ("\xff\xfe", as_json, 422),
        (" " * (MAX_BODY_BYTES + 1), as_json, 413),
    ):
        response = client.post("/api/answer", content=content, headers=headers)
        assert response.status_code == status, content[:20]
    assert client.get("/api/answer").status_code == 405
    assert client.put("/api/answer", content=good, headers=as_json).status_code == 405
    assert _journal_bytes(study) == b""
    assert client.post("/api/answer", content=good, headers=as_json | {"origin": BASE}).status_code == 201


def test_without_a_cookie_nothing_is_stored(client: TestClient, study: StudyFolder) -> None:
    assert client.post("/api/answer", json=answer_of(study, 0, 0)).status_code == 401
    client.cookies.set(f"ftengine_turing_{study.study.id}", "A" * 32)
    assert client.post("/api/answer", json=answer_of(study, 0, 0)).status_code == 401
    assert _journal_bytes(study) == b""


def test_a_retried_answer_is_acknowledged_and_a_second_one_refused(client: TestClient, study: StudyFolder) -> None:
    _sign_in(client, study)
    first = client.post("/api/answer", json=answer_of(study, 0, 0))
    before = _journal_bytes(study)
    again = client.post("/api/answer", json=answer_of(study, 0, 0))
    assert (first.status_code, again.status_code) == (201, 200)
    assert {**first.json(), "new": None} == {**again.json(), "new": None}
    for changes in ({"synthetic": False}, {"answer_id": "9" * 32}):
        assert client.post("/api/answer", json=answer_of(study, 0, 0, **changes)).status_code == 409
    assert client.post("/api/answer", json=answer_of(study, 0, 2)).status_code == 409
    assert _journal_bytes(study) == before


def test_two_readers_in_one_browser_do_not_answer_for_each_other(client: TestClient, study: StudyFolder) -> None:
    _sign_in(client, study, 0)
    _sign_in(client, study, 1)  # a second tab replaces the cookie of the first, whose page still says r01
    response = client.post("/api/answer", json=answer_of(study, 0, 0))
    assert response.status_code == 403
    assert "another reader" in response.json()["error"]
    assert client.post("/api/answer", json=answer_of(study, 1, 0)).status_code == 201


def test_time_on_screen_is_kept_and_told_to_the_next_page(client: TestClient, study: StudyFolder) -> None:
    _sign_in(client, study)
    time = {"reader": "r01", "item": study.study.readers[0].showings[0].item, "visit": "a" * 32, "seconds": 12.5}
    assert client.post("/api/time", json=time).status_code == 204
    assert client.get("/api/state").json()["current"]["reading_s"] == 12.5
    assert client.post("/api/time", json=time | {"seconds": -3}).status_code == 422
    assert client.post("/api/time", json=time | {"reader": "r02"}).status_code == 403


def test_a_changed_case_is_not_shown_and_the_operator_is_told(study: StudyFolder) -> None:
    journals, told = Journals(study, warn=pytest.fail), list[str]()
    showing = study.study.readers[0].showings[0]
    study.case_file(showing.case).write_bytes(bytes(study.study.case_bytes))
    with TestClient(make_app(study, journals, warn=told.append), base_url=BASE) as client:
        _sign_in(client, study)
        response = client.get(f"/api/case/{showing.item}")
    journals.close()
    assert response.status_code == 500
    assert response.json() == {"error": "this case cannot be shown; tell whoever runs the study"}
    assert len(told) == 1
    assert "not the file that the study was built with" in told[0]


def test_a_full_disk_is_told_and_the_answer_can_be_sent_again(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals, told = Journals(study, warn=pytest.fail), list[str]()
    with TestClient(make_app(study, journals, warn=told.append), base_url=BASE) as client:
        _sign_in(client, study)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", _full)
            assert client.post("/api/answer", json=answer_of(study, 0, 0)).status_code == 507
        assert _journal_bytes(study) == b""
        assert client.post("/api/answer", json=answer_of(study, 0, 0)).status_code == 201
    journals.close()
    assert "could not be written (No space left on device)" in told[0]


def test_a_disk_that_takes_nothing_back_is_told_as_well(study: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    journals, told = Journals(study, warn=pytest.fail), list[str]()
    with TestClient(make_app(study, journals, warn=told.append), base_url=BASE) as client:
        _sign_in(client, study)
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", _full)
            patch.setattr("os.ftruncate", _full)
            for _ in range(2):
                assert client.post("/api/answer", json=answer_of(study, 0, 0)).status_code == 507
        assert client.post("/api/answer", json=answer_of(study, 0, 0)).status_code == 201
    journals.close()
    assert len(told) == 2
    assert _journal_bytes(study).count(b"\n") == 1
    assert len(Answers.read(study, study.study.readers[0]).by_item) == 1


def _full(_file: int, _size: int = 0) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_names_from_outside_are_data_to_the_page(client: TestClient, study: StudyFolder) -> None:
    """The page writes every text with textContent; nothing of the study is put into HTML."""
    script = client.get("/app.js").text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in script
    _sign_in(client, study)
    assert client.get("/api/state").headers["content-type"] == "application/json"
