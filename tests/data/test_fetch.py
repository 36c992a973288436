"""From the name of a benchmark to predictions, against a local server; and copies that a user has."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qtdog.core.errors import DataError, RunError
from qtdog.data import cards
from qtdog.data.cards import CARDS
from qtdog.data.dataset import require_images
from qtdog.data.fetch import Fetched, fetch, remember, remembered
from qtdog.data.file_index import files_below
from qtdog.data.open import open_dataset, open_texts
from qtdog.data.verify import verify

NAMES = [name for name in CARDS if name != "rotated-digits"]
IMAGES = [name for name in NAMES if name not in ("amazon-reviews", "office-caltech")]


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", IMAGES)
def test_every_benchmark_is_fetched_verified_trained_on_and_predicted(name, card, home, qtdog, tmp_path):
    card = card(name)
    code, _, err = qtdog("data", "fetch", name, "--yes")
    assert code == 0, err
    assert card.licence in err
    assert {path.name for path in home.iterdir()} == {"fetched.json", name}
    dataset = open_dataset(name)
    assert (dataset.domains, dataset.classes) == (card.domains, card.classes)
    assert dataset.missing_classes() == []
    code, out, _ = qtdog("data", "verify", name, "--json")
    report = json.loads(out)
    assert report["changes"] == {"missing": [], "changed": [], "added": []}
    assert (code, report["n_images"]) == (0, len(dataset))
    net = ("--backbone", "digits_cnn", "--weights", "none", "--image-size", 12, "--batch-size", 2)
    short = ("--steps", 1, "--start-step", 0, "--set", "train.eval_every=1", "--quantizer", "lsq")
    target = "hospital_2" if name == "camelyon17" else dataset.domains[-1]
    run = tmp_path / "run"
    code, _, err = qtdog("train", "--data", name, f"--target={target}", *net, *short, "--out", run)
    assert code == 0, err
    Path(tmp_path / "one").mkdir()
    from PIL import Image

    pixels = require_images(dataset).read(0)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(tmp_path / "one" / "a.png")
    code, out, err = qtdog("predict", run / "model.safetensors", tmp_path / "one", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["class"] in dataset.classes


def test_reviews_are_fetched_and_verified(card, home, qtdog):
    card("amazon-reviews")
    assert qtdog("data", "fetch", "amazon-reviews", "--yes")[0] == 0
    code, out, _ = qtdog("data", "verify", "amazon-reviews")
    assert code == 0
    assert "nothing wrong" in out
    reviews = open_texts("amazon-reviews")
    assert reviews.text(0) == 'It said "0",\nand more, ü'
    with pytest.raises(DataError, match="a data set of texts"):
        open_dataset("amazon-reviews")


def test_what_has_no_address_says_how_it_is_used(home, qtdog):
    code, _, err = qtdog("data", "fetch", "office-caltech", "--yes")
    assert code == 1
    assert "office-caltech cannot be downloaded. No official download is known" in err
    assert "qtdog data import FOLDER --as office-caltech" in err
    here = {card["name"]: card["here"] for card in json.loads(qtdog("data", "list", "--json")[1])}
    assert (here["office-caltech"], here["rotated-digits"]) == ("", "built in")
    code, out, _ = qtdog("data", "card", "office-caltech")
    assert (code, "amazon 958, caltech 1,123, dslr 157, webcam 295" in out) == (0, True)


def test_known_duplicates_of_domainnet_are_left_out(card, home):
    card = card("domainnet")
    found = fetch(card, home / "domainnet")
    assert found.layout == "the authors' lists (TLlib)"
    assert not [path for path in files_below(home / "domainnet") if "duplicate" in path]
    assert len(files_below(home / "domainnet")) == 6 * 3 * 5


def test_camera_traps_keep_four_places_and_ten_classes(card, home):
    fetch(card("terra-incognita-24330"), home / "t")
    keys = files_below(home / "t")
    assert {key.split("/")[0] for key in keys} == set(CARDS["terra-incognita-24330"].domains or ())
    assert len(keys) == 4 * 10 * 2


def test_an_interrupted_fetch_goes_on_and_says_what_was_saved(card, server, home, qtdog):
    card = card("pacs")
    size = len(server.files["pacs.zip"].content)
    server.files["pacs.zip"].ends_after = [size // 2, 0]
    code, _, err = qtdog("data", "fetch", "pacs", "--yes")
    assert code == 1
    assert "the connection ended after" in err
    assert [path.name for path in home.iterdir()] == [".pacs.fetch"]
    server.files["pacs.zip"].ends_after = []
    code, _, err = qtdog("data", "fetch", "pacs", "--yes")
    assert code == 0
    assert f"{size / 1e6:,.3f} MB, of which {size // 2 / 1e6:,.3f} MB were there already" in err
    assert card.archives[0].file not in below(home)
    assert sorted(path.name for path in home.iterdir()) == ["fetched.json", "pacs"]


def test_ctrl_c_keeps_what_was_downloaded(card, home, qtdog, monkeypatch):
    card("pacs")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    from qtdog.data import fetch as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "unpack", interrupt)
        code, _, err = qtdog("data", "fetch", "pacs", "--yes")
    assert code == 130
    assert "the same command goes on" in err
    assert below(home) == [".pacs.fetch", ".pacs.fetch/.lock", ".pacs.fetch/pacs.zip"]
    code, _, err = qtdog("data", "fetch", "pacs", "--yes")
    assert code == 0
    assert "were there already" in err


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_without_consent_nothing_is_downloaded(card, server, home, qtdog, monkeypatch, answer):
    import io

    card("pacs")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    code, _, err = qtdog("data", "fetch", "pacs")
    assert code == 2
    assert "the terms were not agreed to" in err
    assert (server.asked, home.exists()) == ([], False)


def test_the_first_hash_is_trusted_and_the_next_must_be_the_same(card, server, published, home, qtdog):
    card("vlcs")
    _, _, err = qtdog("data", "fetch", "vlcs", "--yes")
    assert "nobody published a hash of vlcs.tar.gz: this first download is trusted" in err
    shutil.rmtree(home / "vlcs")
    assert "nobody published" not in qtdog("data", "fetch", "vlcs", "--yes")[2]
    shutil.rmtree(home / "vlcs")
    server.files["vlcs.tar.gz"].content = published("pacs")["pacs.zip"]
    code, _, err = qtdog("data", "fetch", "vlcs", "--yes")
    assert code == 1
    assert "the content has sha256" in err
    assert not (home / "vlcs").exists()


def test_a_hash_of_the_card_must_be_met(card, home):
    card = card("pacs")
    archive = replace(card.archives[0], sha256="0" * 64)
    with pytest.raises(DataError, match="expected was 0000"):
        fetch(replace(card, archives=(archive,)), home / "pacs")


def test_other_counts_are_said_and_the_hash_is_not_remembered(card, home, qtdog, monkeypatch):
    card = card("pacs")
    monkeypatch.setitem(CARDS._members, "pacs", replace(card, expected_counts=cards.PACS.expected_counts))
    code, _, err = qtdog("data", "fetch", "pacs", "--yes")
    assert code == 1
    assert "domain sketch has 21 images, the dataset card says 3,929" in err
    assert remembered("pacs") == {}


def test_a_hostile_archive_leaves_nothing(card, server, packers, home, tmp_path):
    card = card("pacs")
    server.files["pacs.zip"].content = packers["zip"]({"kfold/a.txt": b"x", "../../evil.txt": b"x"})
    with pytest.raises(DataError, match="leaves the folder"):
        fetch(card, home / "pacs")
    assert below(tmp_path) == ["home"]


def test_a_damaged_archive_is_downloaded_anew(card, server, home):
    card = card("pacs")
    good = server.files["pacs.zip"].content
    server.files["pacs.zip"].content = good[: len(good) // 2]
    with pytest.raises(DataError, match=r"pacs\.zip is damaged"):
        fetch(card, home / "pacs")
    assert below(home) == []
    server.files["pacs.zip"].content = good
    assert fetch(card, home / "pacs").n_saved == 0


def test_an_archive_of_something_else_is_said(card, server, packers, home):
    card = card("pacs")
    server.files["pacs.zip"].content = packers["zip"]({"kfold/photo/dog/a.jpg": b"x"})
    with pytest.raises(
        DataError, match=r"is no copy of pacs.*missing: art_painting, cartoon, sketch.*is in .*remove it"
    ):
        fetch(card, home / "pacs")
    assert not (home / "pacs").exists()
    assert not (home / ".pacs.fetch" / "unpacked").exists()


def test_a_fetch_that_was_killed_behind_its_rename_is_finished(card, server, home, qtdog):
    card = card("vlcs")
    first = fetch(card, home / "vlcs")
    work = home / ".vlcs.fetch"  # as a kill leaves it: the folder has its name, and what was downloaded is still there
    work.mkdir()
    (work / "vlcs.tar.gz").write_bytes(b"x")
    asked = len(server.asked)
    code, _, err = qtdog("data", "fetch", "vlcs", "--yes")
    assert code == 0, err
    assert not work.exists()
    assert len(server.asked) == asked
    assert remembered("vlcs") == {file.path.name: file.sha256 for file in first.files}
    code, _, err = qtdog("data", "fetch", "vlcs", "--yes")
    assert "is there already" in err


def test_what_a_kill_left_unsettled_is_settled_by_the_next_fetch(card, server, home):
    vlcs, settled = card("vlcs"), []

    def killed(fetched):
        (home / ".fetched.json.abcdefgh.tmp").write_text("{")
        raise KeyboardInterrupt

    def settle(fetched):
        settled.append(fetched.folder)
        remember("vlcs", fetched)

    with pytest.raises(KeyboardInterrupt):
        fetch(vlcs, home / "vlcs", settle=killed)
    assert (home / "vlcs").is_dir()
    fetch(vlcs, home / "vlcs", settle=settle)
    assert settled == [home / "vlcs"]
    assert remembered("vlcs")
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_is_there_is_left_alone(card, server, home, qtdog):
    card("pacs")
    (home / "pacs").mkdir(parents=True)
    (home / "pacs" / "mine.txt").write_text("x")
    code, _, err = qtdog("data", "fetch", "pacs", "--yes")
    assert code == 1
    assert "is there already" in err
    assert server.asked == []


def test_what_cannot_be_downloaded_says_what_to_do(home, qtdog):
    code, _, err = qtdog("data", "fetch", "terra-incognita-24788", "--yes")
    assert code == 1
    assert "qtdog data import FOLDER --as terra-incognita-24788" in err


def test_two_processes_do_not_fetch_into_one_folder(card, home):
    import fcntl

    card = card("pacs")
    (home / ".pacs.fetch").mkdir(parents=True)
    handle = os.open(home / ".pacs.fetch" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="another process is fetching"):
        fetch(card, home / "pacs")
    os.close(handle)


def test_a_changed_folder_is_noticed(card, home, qtdog):
    card = card("pacs")
    fetch(card, home / "pacs")
    first, second, *_ = open_dataset("pacs").keys
    (home / "pacs" / first).unlink()
    shutil.copy(home / "pacs" / open_dataset("pacs").keys[-1], home / "pacs" / second)
    shutil.copy(home / "pacs" / second, home / "pacs" / "photo" / "dog" / "new.jpg")
    code, out, _ = qtdog("data", "verify", "pacs")
    assert code == 1
    for text in (
        f"missing: 1\n  {first}",
        f"differ from the list: 1\n  {second}",
        "not in the list: 1\n  photo/dog/new.jpg",
    ):
        assert text in out


def test_a_damaged_list_of_hashes_is_said(card, home):
    fetch(card("pacs"), home / "pacs")
    (home / "pacs" / ".qtdog" / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(DataError, match="SHA256SUMS is damaged"):
        verify(open_dataset("pacs"))


def test_a_damaged_note_of_hashes_is_said(home):
    home.mkdir()
    (home / "fetched.json").write_text("[1]")
    with pytest.raises(DataError, match=r"fetched\.json is damaged .*remove it"):
        remember("pacs", Fetched(home, [], [], ""))


def test_a_copy_is_imported_and_its_counts_are_checked(card, home, qtdog, monkeypatch, tmp_path):
    card = card("pacs")
    fetch(card, tmp_path / "theirs")
    code, _, err = qtdog("data", "import", tmp_path / "theirs", "--as", "pacs")
    assert code == 0
    assert "84 images, laid out before as DOMAIN/CLASS/image (DomainBed, TLlib)" in err
    assert len(open_dataset("pacs")) == 84
    assert json.loads((home / "pacs" / ".qtdog" / "origin.json").read_text())["imported_from"] == "theirs"
    monkeypatch.setitem(CARDS._members, "pacs", replace(card, expected_counts={"sketch": 3929}))
    code, _, err = qtdog("data", "import", tmp_path / "theirs", "--as", "pacs", "--copy", "--to", tmp_path / "other")
    assert code == 1
    assert "domain sketch has 21 images, the dataset card says 3,929" in err
    assert qtdog("data", "import", tmp_path / "their", "--as", "pacs")[0] == 1
    assert qtdog("data", "import", tmp_path / "theirs", "--as", "pcas")[0] == 2


def test_what_is_here_is_told(card, home, qtdog):
    card = card("pacs")
    fetch(card, home / "pacs")
    here = {one["name"]: one["here"] for one in json.loads(qtdog("data", "list", "--json")[1])}
    assert (here["pacs"], here["vlcs"], here["rotated-digits"]) == (str(home / "pacs"), "", "built in")
    code, out, _ = qtdog("data", "card", "domainnet")
    assert code == 0
    assert "expected 586,575" in out
    assert "protocol 15,000 steps, evaluated every 1,000" in out
    assert "art_p" in qtdog("data", "card", "pacs")[1]  # a narrow terminal folds the name
