from pathlib import Path

import pytest

from qtdog.core.errors import DataError
from qtdog.data.cards import PACS
from qtdog.data.open import open_dataset


def make_pacs(root: Path, leave_out: str = "") -> None:
    for domain in set(PACS.domains or ()) - {leave_out}:
        for name in PACS.classes or ():
            (root / domain / name).mkdir(parents=True)
            (root / domain / name / "a.jpg").touch()


def test_names_folders_and_manifests(image_tree: Path) -> None:
    assert open_dataset("rotated-digits").card.name == "rotated-digits"
    assert len(open_dataset(str(image_tree))) == 54
    (image_tree / "list.csv").write_text("path,class,domain\nnight/cat/0.png,cat,a\nnight/cat/1.png,cat,b\n")
    assert open_dataset(str(image_tree / "list.csv")).domains == ("a", "b")


def test_a_relative_folder_needs_no_slash(image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image_tree.parent)
    assert len(open_dataset("photos")) == 54


def test_a_benchmark_is_found_below_qtdog_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pacs(tmp_path / "pacs")
    monkeypatch.setenv("QTDOG_DATA", str(tmp_path))
    assert open_dataset("pacs").card == PACS


def test_without_qtdog_data_it_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTDOG_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"where is 'pacs'.*qtdog data fetch pacs.* set QTDOG_DATA to the folder"):
        open_dataset("pacs")


def test_with_a_wrong_qtdog_data_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTDOG_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"QTDOG_DATA is .*pacs is not a folder"):
        open_dataset("pacs")


def test_a_folder_that_is_not_the_benchmark_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pacs(tmp_path / "pacs", leave_out="sketch")
    monkeypatch.setenv("QTDOG_DATA", str(tmp_path))
    with pytest.raises(DataError, match="is not pacs: domain sketch is missing"):
        open_dataset("pacs")


def test_a_misspelt_name_gets_the_nearest_and_the_path_is_said_missing() -> None:
    with pytest.raises(DataError, match=r"did you mean 'rotated-digits'\? Known: .*does not exist"):
        open_dataset("rotatd-digits")


def test_of_names_with_the_same_word_all_are_shown() -> None:
    with pytest.raises(DataError, match=r"did you mean 'digits-dg' or 'rotated-digits'\?"):
        open_dataset("digits")


def test_a_misspelt_folder_gets_its_neighbour(image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image_tree.parent)
    with pytest.raises(DataError, match=r"did you mean photos\?"):
        open_dataset("photo")
    with pytest.raises(DataError, match=r"did you mean .*photos\?"):
        open_dataset(str(image_tree.parent / "fotos"))


def test_min_domains_is_passed_on(image_tree: Path) -> None:
    single = image_tree / "one"
    (single / "d" / "cat").mkdir(parents=True)
    (single / "d" / "cat" / "a.png").touch()
    with pytest.raises(DataError, match="has 1 domain"):
        open_dataset(str(single))
    assert open_dataset(str(single), min_domains=1).domains == ("d",)
