"""The store over HTTP: exactly the requested bytes, nothing besides the volumes, nobody besides viewers of this machine."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import uvicorn
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from zarr.storage import FsspecStore

from ftengine.errors import ConfigError, StoreError
from ftengine.store import index
from ftengine.store.location import locate
from ftengine.store.reader import Store, open_store
from ftengine.store.serve import DAMAGED, PAGE_CASES, VIEWER_ORIGINS, listen, make_app
from ftengine.store.subset import make_subset
from ftengine.store.viewer import case_links
from ftengine.store.writer import Provenance, create_store, write_volume
from tests.support import coordinate_volume, ras_grid_at, small_config

CONFIG = small_config()
SHAPE = (37, 70, 41)
ODD = "d/it's <b>50 %</b> & caf\u00e9 #1?"  # all that needs escaping in HTML or in a URL
SHARD = "volumes/d/labelled/0/c/0/0/0"
BASE = "http://127.0.0.1:8000"


def _write(root: Any, case: str, *, label: bool = True) -> None:
    grid = ras_grid_at(SHAPE)
    image = coordinate_volume(SHAPE)
    values = (image % 3).astype(np.uint8) if label else None
    write_volume(root, case, image, values, grid, grid, CONFIG.region, Provenance("x.nii.gz", "00"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = create_store(tmp_path_factory.mktemp("served") / "s.zarr", CONFIG.region)
    _write(root, "d/labelled")
    _write(root, "d/deep/er/plain", label=False)
    _write(root, ODD)
    with root.only_writer():  # leaves its lock file
        index.compact_index(root)
    return open_store(root)


def _client(path: Path, **options: Any) -> TestClient:
    return TestClient(make_app(path, **options), base_url=BASE)


@pytest.fixture(scope="module")
def client(store: Store) -> TestClient:
    return _client(store.path)


@contextmanager
def _running(path: Path) -> Iterator[str]:
    """A real server on loopback; gives its URL."""
    sock = listen(0)
    config = uvicorn.Config(make_app(path), log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        sock.close()
    assert not thread.is_alive()


# bytes


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_range_gives_exactly_its_bytes(store: Store, client: TestClient, data: st.DataObject) -> None:
    whole = (store.path / SHARD).read_bytes()
    size = len(whole)
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, size + 5))
    suffix = data.draw(st.integers(1, size + 5))
    for header, start, end in (
        (f"bytes={first}-{last}", first, min(last + 1, size)),
        (f"bytes={first}-", first, size),
        (f"bytes=-{suffix}", max(size - suffix, 0), size),
    ):
        answer = client.get(f"/store/{SHARD}", headers={"range": header})
        assert answer.status_code == 206
        assert answer.content == whole[start:end]
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)


def test_without_a_range_the_whole_file_comes(store: Store, client: TestClient) -> None:
    answer = client.get(f"/store/{SHARD}")
    assert answer.status_code == 200
    assert answer.content == (store.path / SHARD).read_bytes()
    assert answer.headers["accept-ranges"] == "bytes"
    head = client.head(f"/store/{SHARD}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]
    assert client.get("/store/zarr.json").json()["attributes"]["ftengine"]["region"] == store.region


@pytest.mark.parametrize(
    "header",
    [
        "bytes=999999999-",
        "bytes=999999999-1000000000",
        "bytes=-0",
        "bytes=5-3",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1",
        "bytes=0-1,4-5",
        "bytes=" + ",".join("0-1" for _ in range(200)),
        "bytes=0-" + "9" * 5000,
        "bytes=\u00b2-\u00b3",  # digits to str.isdigit, none to HTTP
        "items=0-5",
        "0-5",
        "",
    ],
)
def test_a_range_that_cannot_be_served_exactly_is_416(store: Store, client: TestClient, header: str) -> None:
    """Never 200 with the whole file: zarrita would decode its first bytes as the chunk it asked for."""
    answer = client.get(f"/store/{SHARD}", headers=[(b"range", header.encode("latin-1"))])
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{(store.path / SHARD).stat().st_size}"


@pytest.mark.parametrize("case", ["d/labelled", ODD])
def test_tensorstore_and_zarr_read_equal_voxels_over_http(store: Store, case: str) -> None:
    import fsspec

    expected = store.read_volume(case)
    with _running(store.path) as url:
        links = case_links(store, case, url)
        for place, voxels in ((links["image_url"], expected.image), (links["label_url"], expected.label)):
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "http", "base_url": f"{place}0/"},
                "fill_missing_data_reads": False,
            }
            read = tensorstore.open(spec, read=True, open=True).result()
            np.testing.assert_array_equal(read.read().result(), voxels)
            np.testing.assert_array_equal(read[20:36, 33:65, 1:41].read().result(), voxels[20:36, 33:65, 1:41])

            files = fsspec.filesystem("http", asynchronous=True, encoded=True)  # encoded: the URL is escaped already
            array = zarr.open_array(FsspecStore(files, path=f"{place}0"), mode="r")
            np.testing.assert_array_equal(np.asarray(array[:]), voxels)
            np.testing.assert_array_equal(np.asarray(array[20:36, 33:65, 1:41]), voxels[20:36, 33:65, 1:41])


# nothing besides the volumes


@pytest.mark.parametrize(
    "key",
    [
        ".writer.lock",
        "index.parquet",
        "index.d/x.parquet",
        "secret.txt",
        "volumes",
        "volumes/",
        "volumes/d",
        "volumes/d/labelled",
        "volumes/d/labelled/",
        "volumes/d/labelled/.hidden",
        "volumes/d/labelled/0/c/0/0",
        "volumes/d/labelled/0/c/0/0/0/",
        "volumes/d/labelled/0/c/0/0/1",
        "volumes/d/labelled/../labelled/zarr.json",
        "volumes//d/labelled/zarr.json",
        "volumes/./d/labelled/zarr.json",
        "volumes/d/uncommitted/zarr.json",
        "volumes/d/notes.txt",
        "../outside.txt",
        "%2e%2e/outside.txt",
        "%2e%2e%2foutside.txt",
        "..%2foutside.txt",
        "..%5coutside.txt",
        "volumes/d/labelled/%2e%2e/%2e%2e/%2e%2e/%2e%2e/outside.txt",
        "volumes/d/labelled%2fzarr.json",
        "%252e%252e/outside.txt",
        "volumes/d/labelled/zarr.json%00",
        "volumes/d/labelled/" + "n" * 300,
        "/etc/passwd",
        "volumes/d/labelled/out/outside.txt",
        "volumes/d/labelled/link.txt",
        "volumes/d/labelled/loop",
    ],
)
def test_nothing_but_keys_of_volumes_is_served(store: Store, tmp_path: Path, key: str) -> None:
    root = Path(shutil.copytree(store.path, tmp_path / "s.zarr"))
    (tmp_path / "outside.txt").write_text("canary")
    for name in ("secret.txt", "volumes/d/notes.txt", "volumes/d/labelled/.hidden"):
        (root / name).write_text("canary")
    (root / "index.d").mkdir(exist_ok=True)
    (root / "index.d/x.parquet").write_bytes((root / "index.parquet").read_bytes())
    shutil.copytree(root / "volumes/d/labelled", root / "volumes/d/uncommitted")
    folder = root / "volumes/d/labelled"
    (folder / "out").symlink_to(tmp_path)
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    (folder / "loop").symlink_to(folder / "loop")
    assert (root / ".writer.lock").exists()
    # the client would tidy the path: the server must meet it as it stands
    answer = _raw_get(root, f"/store/{key}")
    assert answer == (404, b"not found")


def _raw_get(root: Path, target: str) -> tuple[int, bytes]:
    """One request whose path no library has normalised, through the application as uvicorn calls it."""
    import asyncio
    from urllib.parse import unquote

    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": unquote(target),
        "raw_path": target.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000")],
        "client": ("127.0.0.1", 5000),
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(make_app(root)(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


def test_the_raw_request_reads_what_is_served(store: Store) -> None:
    """The helper above finds files, so that its 404s mean something."""
    assert _raw_get(store.path, f"/store/{SHARD}") == (200, (store.path / SHARD).read_bytes())


def test_a_symlink_that_stays_in_the_store_is_followed(store: Store, tmp_path: Path) -> None:
    root = Path(shutil.copytree(store.path, tmp_path / "s.zarr"))
    shard = root / SHARD
    shard.rename(shard.with_name("moved"))
    shard.symlink_to("moved")
    (tmp_path / "alias.zarr").symlink_to(root)
    assert _client(tmp_path / "alias.zarr").get(f"/store/{SHARD}").content == (store.path / SHARD).read_bytes()


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", ["/", f"/store/{SHARD}", "/nothing"])
def test_methods_that_write_are_refused(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("harm", ["delete", "empty", "unreadable"])
@pytest.mark.parametrize("array", ["0", "labels/seg/0"])
def test_a_lost_shard_is_an_error_not_air(store: Store, tmp_path: Path, array: str, harm: str) -> None:
    """404 would be read as the fill value by every Zarr client."""
    root = Path(shutil.copytree(store.path, tmp_path / "s.zarr"))
    shard = root / f"volumes/d/labelled/{array}/c/0/0/0"
    shard.unlink()
    if harm == "empty":
        shard.touch()
    elif harm == "unreadable":
        shard.symlink_to(tmp_path / "nowhere")
    answer = _client(root).get(f"/store/volumes/d/labelled/{array}/c/0/0/0", headers={"range": "bytes=-100"})
    assert answer.status_code == DAMAGED
    assert "'d/labelled' is missing, empty or unreadable. 'ftengine store verify'" in answer.text
    if array == "0" and harm == "delete":
        with _running(root) as url:
            spec = {"driver": "zarr3", "kvstore": {"driver": "http", "base_url": f"{url}/store/volumes/d/labelled/0/"}}
            lost = tensorstore.open(spec, read=True, open=True).result()
            with pytest.raises(ValueError, match="HTTP code 422"):
                lost.read().result()


def test_a_case_without_a_label_has_none(client: TestClient) -> None:
    assert client.get("/store/volumes/d/deep/er/plain/labels/seg/0/c/0/0/0").status_code == 404
    assert client.get("/store/volumes/d/deep/er/plain/labels/zarr.json").status_code == 404


def test_of_a_subset_only_its_cases_are_served(store: Store, tmp_path: Path) -> None:
    make_subset(store, tmp_path / "few.zarr", cases=["d/labelled"])
    client = _client(tmp_path / "few.zarr")
    assert client.get(f"/store/{SHARD}").content == (store.path / SHARD).read_bytes()
    assert client.get("/store/volumes/d/deep/er/plain/zarr.json").status_code == 404
    page = _Page(client.get("/").text)
    assert "few.zarr" in page.texts
    assert [text for text in page.texts if text in store.cases] == ["d/labelled"]


def test_groups_on_the_way_are_served(client: TestClient) -> None:
    for key in ("zarr.json", "volumes/zarr.json", "volumes/d/zarr.json", "volumes/d/deep/er/zarr.json"):
        answer = client.get(f"/store/{key}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json()["node_type"] == "group"


# nobody besides viewers of this machine


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("attacker.example", 400),
        ("127.0.0.1.attacker.example", 400),
        ("localhost.attacker.example:8000", 400),
        ("attacker.example@127.0.0.1", 400),
        ("[::2]", 400),
        ("0.0.0.0:8000", 400),
        ("127.0.0.1:port", 400),
        ("", 400),
    ],
)
def test_only_names_of_this_machine_are_answered(client: TestClient, host: str, status: int) -> None:
    """A page of another name that resolves to 127.0.0.1 (DNS rebinding) sends its own name."""
    for path in ("/", f"/store/{SHARD}"):
        assert client.get(path, headers={"host": host}).status_code == status


@pytest.mark.parametrize("origin", [*VIEWER_ORIGINS, "http://localhost:5173", "http://127.0.0.1", "http://[::1]:80"])
def test_viewers_may_read_with_ranges(client: TestClient, origin: str) -> None:
    asked = {
        "origin": origin,
        "access-control-request-method": "GET",
        "access-control-request-headers": "range",
        "access-control-request-private-network": "true",
    }
    preflight = client.options(f"/store/{SHARD}", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "range" in preflight.headers["access-control-allow-headers"]
    assert preflight.headers["access-control-allow-methods"] == "GET, HEAD, OPTIONS"
    assert preflight.headers["access-control-allow-private-network"] == "true"
    for path, headers, status in (
        (SHARD, {"range": "bytes=-4"}, 206),
        (SHARD, {"range": "bytes=9-1"}, 416),
        ("volumes/d/labelled/.zattrs", {}, 404),
    ):
        answer = client.get(f"/store/{path}", headers={"origin": origin} | headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == origin  # without it a viewer cannot see the status
        assert "content-range" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    ["https://attacker.example", "null", "http://localhost.attacker.example", "https://niivue.com.attacker.example"],
)
def test_other_pages_may_not_read(client: TestClient, origin: str) -> None:
    asked = {"origin": origin, "access-control-request-method": "GET", "access-control-request-headers": "range"}
    preflight = client.options(f"/store/{SHARD}", headers=asked)
    assert preflight.status_code == 400
    answer = client.get(f"/store/{SHARD}", headers={"origin": origin})
    for found in (preflight, answer):
        assert "access-control-allow-origin" not in found.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_the_list_of_cases_is_for_no_other_page(client: TestClient) -> None:
    answer = client.get("/", headers={"origin": VIEWER_ORIGINS[0]})
    assert "access-control-allow-origin" not in answer.headers


def test_an_origin_can_be_added(store: Store) -> None:
    client = _client(store.path, allow_origins=["https://viewer.example.org:8443"])
    answer = client.get(f"/store/{SHARD}", headers={"origin": "https://viewer.example.org:8443"})
    assert answer.headers["access-control-allow-origin"] == "https://viewer.example.org:8443"
    for wrong in ("*", "viewer.example.org", "https://viewer.example.org/app", "https://a b"):
        with pytest.raises(ConfigError, match=r"--allow-origin .*: want https://HOST"):
            make_app(store.path, allow_origins=[wrong])


def test_plain_options_are_answered(client: TestClient) -> None:
    for path in ("/", f"/store/{SHARD}"):
        answer = client.options(path)
        assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS")


def test_answers_are_not_kept_by_the_browser(client: TestClient) -> None:
    for path in ("/", f"/store/{SHARD}", "/store/zarr.json", "/nothing"):
        headers = client.get(path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"


# the list of cases and the viewer's state


class _Page(HTMLParser):
    """Tags, links and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_lists_cases_escaped_and_runs_no_script(store: Store, client: TestClient) -> None:
    answer = client.get("/")
    page = _Page(answer.text)
    for case in store.cases:
        assert case in page.texts
        assert case_links(store, case, BASE)["image_url"] in page.texts
        assert case_links(store, case, BASE)["neuroglancer_url"] in page.links
    assert not {"script", "img", "link", "iframe", "b"} & set(page.tags)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_a_long_list_has_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PAGE_CASES > 1
    monkeypatch.setattr("ftengine.store.serve.PAGE_CASES", 2)
    client = _client(store.path)
    seen = [text for n in (1, 2) for text in _Page(client.get(f"/?page={n}").text).texts if text in store.cases]
    assert seen == store.cases
    for wrong in ("0", "3", "-1", "x", "9" * 20, ""):
        assert client.get(f"/?page={wrong}").status_code == 404


def test_every_address_of_a_case_is_served(store: Store, client: TestClient) -> None:
    for case in store.cases:
        links = case_links(store, case, BASE)
        assert client.get(f"{links['image_url']}zarr.json").json()["attributes"]["ome"]["omero"]["name"] == case
        if links["label_url"] is not None:
            assert "image-label" in client.get(f"{links['label_url']}zarr.json").json()["attributes"]["ome"]


def test_the_viewer_state_shows_image_and_label(store: Store) -> None:
    from urllib.parse import unquote

    links = case_links(store, "d/labelled", BASE)
    state = links["neuroglancer_state"]
    assert json.loads(unquote(links["neuroglancer_url"].partition("#!")[2])) == state
    image, label = state["layers"]
    assert image["source"] == f"{BASE}/store/volumes/d/labelled/|zarr3:"
    assert image["shaderControls"]["normalized"]["range"] == list(store.window_hu)
    assert label["source"] == f"{BASE}/store/volumes/d/labelled/labels/seg/|zarr3:"
    assert label["type"] == "segmentation"
    assert label["segments"] == [str(value) for value in sorted(store.labels.values()) if value]
    written = store.location.read_bytes("volumes/d/labelled/labels/seg/zarr.json")
    colors = json.loads(written)["attributes"]["ome"]["image-label"]["colors"]
    assert label["segmentColors"] == {
        str(c["label-value"]): "#{:02x}{:02x}{:02x}".format(*c["rgba"][:3]) for c in colors
    }
    assert list(state["dimensions"]) == ["x", "y", "z"]
    assert state["dimensions"]["z"] == [store.spacing_mm_zyx[0] / 1000, "m"]
    assert state["position"] == [SHAPE[2] / 2, SHAPE[1] / 2, SHAPE[0] / 2]
    plain = case_links(store, "d/deep/er/plain", BASE)
    assert plain["label_url"] is None
    assert [layer["type"] for layer in plain["neuroglancer_state"]["layers"]] == ["image"]
    with pytest.raises(StoreError, match="holds no case 'd/none'"):
        case_links(store, "d/none", BASE)


def test_the_views_are_radiological(store: Store) -> None:
    """RAS+ axes: +x is the patient's right, +y anterior, +z superior. A view shows its own +x to the right and +y downwards."""
    from scipy.spatial.transform import Rotation

    layout = case_links(store, "d/labelled", BASE)["neuroglancer_state"]["layout"]
    axial, column = layout["children"]
    coronal, sagittal = column["children"]
    left, anterior, superior = (-1, 0, 0), (0, 1, 0), (0, 0, 1)
    posterior = (0, -1, 0)
    for view, right_of_picture, top_of_picture in (
        (axial, left, anterior),
        (coronal, left, superior),
        (sagittal, posterior, superior),
    ):
        assert view["layout"] == "xy"
        assert view["layers"] == ["CT", "seg"]
        turn = Rotation.from_quat(view["crossSectionOrientation"]["value"])
        np.testing.assert_allclose(turn.apply((1, 0, 0)), right_of_picture, atol=1e-12)
        np.testing.assert_allclose(turn.apply((0, -1, 0)), top_of_picture, atol=1e-12)


def test_what_cannot_be_served_is_refused(store: Store, tmp_path: Path) -> None:
    in_a_bucket = open_store(store.path)
    in_a_bucket.volumes = locate("s3://bucket/prefix")  # as of a subset whose volumes lie there
    with pytest.raises(ConfigError, match=r"s3://bucket/prefix: lies in a bucket; want a local store"):
        make_app(in_a_bucket)
    with pytest.raises(StoreError, match="is not a store"):
        make_app(tmp_path)
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"--port {port}: 127\.0\.0\.1:{port} cannot be had .*Choose another port"
        ):
            listen(port)
