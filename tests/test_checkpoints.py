"""Fetching a checkpoint from a server of our own."""

import hashlib
import resource
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from samfeat.teacher_cache.teachers import checkpoints
from samfeat.teacher_cache.teachers.checkpoints import CHECKPOINTS, Checkpoint, fetch_checkpoint, file_sha256

CONTENT = np.random.default_rng(0).bytes(300_000)


@dataclass
class Site:
    """What the server does, and what it was asked."""

    url: str = ""
    ranges: bool = True
    cut_after: int | None = None
    requested: list[str | None] = field(default_factory=list)

    def checkpoint(self, content: bytes = CONTENT) -> Checkpoint:
        return Checkpoint(f"{self.url}/toy.pth", hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requested.append(wanted)
            if self.path != "/toy.pth":
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.end_headers()
            end = len(CONTENT) if state.cut_after is None else start + state.cut_after
            self.wfile.write(CONTENT[start:end])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "BLOCK", 10_000)


def test_a_file_arrives_whole(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch_checkpoint(site.checkpoint(), tmp_path / "new" / "folder", progress=lambda *at: seen.append(at))
    assert path == tmp_path / "new" / "folder" / "toy.pth"
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["toy.pth"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert len(seen) > 10


def test_what_is_there_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    fetch_checkpoint(site.checkpoint(), tmp_path)
    fetch_checkpoint(site.checkpoint(), tmp_path)
    assert len(site.requested) == 1


def test_an_interrupted_download_is_continued(site: Site, tmp_path: Path) -> None:
    site.cut_after = 120_000
    with pytest.raises(OSError, match="120000 of 300000 bytes; fetch again to continue"):
        fetch_checkpoint(site.checkpoint(), tmp_path)
    assert (tmp_path / "toy.pth.part").read_bytes() == CONTENT[:120_000]
    site.cut_after = None
    assert fetch_checkpoint(site.checkpoint(), tmp_path).read_bytes() == CONTENT
    assert site.requested == [None, "bytes=120000-"]
    assert not (tmp_path / "toy.pth.part").exists()


def test_a_server_without_ranges_starts_over(site: Site, tmp_path: Path) -> None:
    (tmp_path / "toy.pth.part").write_bytes(CONTENT[:50_000])
    site.ranges = False
    assert fetch_checkpoint(site.checkpoint(), tmp_path).read_bytes() == CONTENT
    assert site.requested == ["bytes=50000-"]


def test_a_complete_part_is_only_checked(site: Site, tmp_path: Path) -> None:
    (tmp_path / "toy.pth.part").write_bytes(CONTENT)
    assert fetch_checkpoint(site.checkpoint(), tmp_path).read_bytes() == CONTENT
    assert site.requested == []


def test_a_part_that_is_too_long_is_thrown_away(site: Site, tmp_path: Path) -> None:
    (tmp_path / "toy.pth.part").write_bytes(CONTENT + b"more")
    assert fetch_checkpoint(site.checkpoint(), tmp_path).read_bytes() == CONTENT
    assert site.requested == [None]


@pytest.mark.parametrize("other", [CONTENT[:-1] + b"?", CONTENT[:50_000]], ids=["other bytes", "longer than known"])
def test_other_content_is_removed(site: Site, tmp_path: Path, other: bytes) -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match="removed, fetch again"):
        fetch_checkpoint(site.checkpoint(other), tmp_path, progress=lambda done, _: seen.append(done))
    assert list(tmp_path.iterdir()) == []
    assert max(seen) <= len(other) + checkpoints.BLOCK  # it does not read on for ever


def test_an_unknown_file_of_that_name_is_left_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "toy.pth").write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        fetch_checkpoint(site.checkpoint(), tmp_path)
    assert (tmp_path / "toy.pth").read_bytes() == b"mine"
    assert site.requested == []


def test_a_missing_file_and_a_missing_server_are_one_line(site: Site, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.pth.*404") as absent:
        fetch_checkpoint(Checkpoint(f"{site.url}/gone.pth", "0" * 64, 10), tmp_path)
    with pytest.raises(OSError, match="fetch again to continue") as dead:
        fetch_checkpoint(Checkpoint("http://127.0.0.1:1/toy.pth", "0" * 64, 10), tmp_path)
    assert "\n" not in str(absent.value) + str(dead.value)


def test_a_full_disk_keeps_what_fitted(site: Site, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is then an OSError
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="fetch again to continue"):
            fetch_checkpoint(site.checkpoint(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "toy.pth.part").read_bytes() == CONTENT[:100_000]
    assert fetch_checkpoint(site.checkpoint(), tmp_path).read_bytes() == CONTENT
    assert site.requested[1] == "bytes=100000-"


def test_the_official_files() -> None:
    assert {name: known.name for name, known in CHECKPOINTS.items()} == {
        "vit_h": "sam_vit_h_4b8939.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_b": "sam_vit_b_01ec64.pth",
    }
    assert all(len(bytes.fromhex(known.sha256)) == 32 for known in CHECKPOINTS.values())
    with pytest.raises(ValueError, match="vit_h, vit_l, vit_b, got 'vit_t'"):
        fetch_checkpoint("vit_t", Path("nowhere"))


def test_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
