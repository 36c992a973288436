"""One file, from servers good and bad."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from qtdog.core.errors import DataError
from qtdog.data.cards import Archive
from qtdog.data.download import Limits, download, download_address

CONTENT = bytes(range(256)) * 40


def get(server: Any, folder: Path, *names: str, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return download(Archive("a.zip", tuple(server.url(name) for name in names)), folder, **options)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole(server, tmp_path):
    server.add("a", CONTENT)
    seen: list[Any] = []
    found = get(server, tmp_path, "a", progress=lambda *told: seen.append(told))
    assert found.path.read_bytes() == CONTENT
    assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert (found.n_bytes, found.n_saved) == (len(CONTENT), 0)
    assert files(tmp_path) == ["a.zip"]
    assert seen[-1] == ("a.zip", len(CONTENT), len(CONTENT))


def test_what_is_there_is_not_asked_for_again(server, tmp_path):
    server.add("a", CONTENT)
    get(server, tmp_path, "a")
    assert get(server, tmp_path, "a").n_saved == len(CONTENT)
    assert len(server.asked) == 1


def test_a_broken_connection_is_gone_on_with(server, tmp_path):
    server.add("a", CONTENT, ends_after=[3000, 2000, None])
    found = get(server, tmp_path, "a")
    assert found.path.read_bytes() == CONTENT
    assert server.asked == [("a", ""), ("a", "bytes=3000-"), ("a", "bytes=5000-")]
    assert server.n_sent == len(CONTENT)


def test_a_later_attempt_goes_on_and_says_what_it_saved(server, tmp_path):
    server.add("a", CONTENT, ends_after=[4000, 0])
    with pytest.raises(DataError, match=r"the connection ended after 4,000 of 10,240 bytes"):
        get(server, tmp_path, "a")
    assert files(tmp_path) == ["a.zip.part", "a.zip.part.json"]
    server.files["a"].ends_after = []
    sent = server.n_sent
    found = get(server, tmp_path, "a")
    assert found.path.read_bytes() == CONTENT
    assert found.n_saved == 4000
    assert server.n_sent - sent == len(CONTENT) - 4000
    assert files(tmp_path) == ["a.zip"]


def test_a_file_that_changed_meanwhile_is_taken_from_its_start(server, tmp_path):
    server.add("a", b"old" * 1000, ends_after=[1500, 0])
    with pytest.raises(DataError):
        get(server, tmp_path, "a")
    server.add("a", CONTENT, etag='"2"')
    found = get(server, tmp_path, "a")
    assert found.path.read_bytes() == CONTENT
    assert found.n_saved == 0


def test_a_server_that_cannot_go_on_starts_anew(server, tmp_path):
    server.add("a", CONTENT, ends_after=[4000, None], ranges=False)
    assert get(server, tmp_path, "a").path.read_bytes() == CONTENT
    assert server.n_sent == len(CONTENT) + 4000


def test_a_weak_version_is_no_ground_to_go_on_from(server, tmp_path):
    server.add("a", CONTENT, ends_after=[4000, None], etag='W/"1"')
    assert get(server, tmp_path, "a").path.read_bytes() == CONTENT
    assert {asked for _, asked in server.asked} == {""}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"status": 404}, "404"),
        ({"status": 403}, "403"),
        ({"status": 503}, "503"),
        ({"kind": "text/html; charset=utf-8"}, "a web page instead of the file"),
        ({"ends_after": [0]}, "the connection ended after 0 of 10,240 bytes"),
    ],
)
def test_the_next_mirror_helps(server, tmp_path, how, reason):
    server.add("bad", CONTENT, **how)
    server.add("good", CONTENT)
    found = get(server, tmp_path, "bad", "good")
    assert found.path.read_bytes() == CONTENT
    assert found.url == server.url("good")
    with pytest.raises(DataError, match=rf"a\.zip could not be downloaded:\n  .*bad: .*{reason}"):
        get(server, tmp_path / "alone", "bad")
    assert not list((tmp_path / "alone").glob("a.zip"))


def test_a_part_of_one_mirror_is_not_gone_on_with_at_another(server, tmp_path):
    server.add("first", b"x" * 5000, ends_after=[2000, 0])
    server.add("second", CONTENT)
    found = get(server, tmp_path, "first", "second")
    assert found.path.read_bytes() == CONTENT
    assert found.n_saved == 0


def test_the_mirror_of_a_part_is_asked_first(server, tmp_path):
    server.add("first", b"", status=404)
    server.add("second", CONTENT, ends_after=[2000, 0])
    with pytest.raises(DataError):
        get(server, tmp_path, "first", "second")
    server.files["second"].ends_after = []
    del server.asked[:]
    assert get(server, tmp_path, "first", "second").n_saved == 2000
    assert server.asked == [("second", "bytes=2000-")]


def test_another_content_is_refused_and_the_next_mirror_tried(server, tmp_path):
    server.add("wrong", CONTENT[:-1] + b"?")
    server.add("right", CONTENT)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert get(server, tmp_path, "wrong", "right", sha256=sha256).url == server.url("right")
    with pytest.raises(DataError, match=r"the content has sha256 [0-9a-f]{64}, expected was"):
        get(server, tmp_path / "other", "wrong", sha256=sha256)
    assert files(tmp_path / "other") == []


def test_redirections_are_followed_also_when_going_on(server, tmp_path):
    server.add("real", CONTENT, ends_after=[3000, None])
    server.add("old", b"", moved_to=server.url("real"))
    assert get(server, tmp_path, "old").path.read_bytes() == CONTENT
    assert ("real", "bytes=3000-") in server.asked


def test_a_circle_of_redirections_ends(server, tmp_path):
    server.add("a", b"", moved_to=server.url("a"))
    with pytest.raises(DataError, match="could not be downloaded"):
        get(server, tmp_path, "a")


def test_a_slow_server_is_waited_for_and_a_silent_one_is_not(server, tmp_path):
    server.add("slow", CONTENT[:1000], pause_s=0.02)
    assert get(server, tmp_path, "slow", limits=Limits(timeout_s=0.5)).n_bytes == 1000
    server.add("silent", CONTENT, pause_s=5)
    with pytest.raises(DataError, match="timed out"):
        get(server, tmp_path / "other", "silent", limits=Limits(timeout_s=0.1, pause_s=0))


def test_an_address_that_is_none_is_said(tmp_path):
    with pytest.raises(DataError, match="no address"):
        download(Archive("a.zip", ("nowhere",)), tmp_path)
    with pytest.raises(DataError, match="it has no address"):
        download(Archive("a.zip", ()), tmp_path)


def test_a_damaged_note_of_a_part_is_no_obstacle(server, tmp_path):
    server.add("a", CONTENT)
    (tmp_path / "a.zip.part").write_bytes(b"junk")
    (tmp_path / "a.zip.part.json").write_text("[")
    assert get(server, tmp_path, "a").path.read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    server.add("a", CONTENT, ends_after=[9000, 0])
    with pytest.raises(DataError):
        get(server, tmp_path, "a")
    server.add("a", CONTENT[:100], etag='"1"')
    assert get(server, tmp_path, "a").path.read_bytes() == CONTENT[:100]


def test_google_drive_is_asked_without_its_page():
    assert download_address("gdrive:XYZ").endswith("download?id=XYZ&export=download&confirm=t")
    assert download_address("https://example.org/a:b") == "https://example.org/a:b"


def test_a_server_that_does_not_say_how_long_the_file_is(server, tmp_path):
    server.add("a", CONTENT, sized=False)
    seen: list[Any] = []
    assert get(server, tmp_path, "a", progress=lambda *told: seen.append(told)).path.read_bytes() == CONTENT
    assert seen[0][2] is None
    assert seen[-1] == ("a.zip", len(CONTENT), len(CONTENT))
