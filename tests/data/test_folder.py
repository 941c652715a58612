"""Folders of captioned pictures: three caption forms, faults named, and the report of ``check``."""

from __future__ import annotations

import json
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glide_fast.data.check import check
from glide_fast.data.folder import load_dataset, load_folder
from glide_fast.text.tokenizer import train_tokenizer

COLOURS = {"red.png": "red", "green.jpg": "lime", "blue.webp": "blue"}


def paint(folder: Path, names: dict[str, str] = COLOURS, side: int = 40) -> Path:
    for name, colour in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side + 10), colour).save(folder / name)
    return folder


def with_texts(folder: Path) -> Path:
    for name, colour in COLOURS.items():
        (folder / name).with_suffix(".txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return folder


def with_csv(folder: Path, *, name: str = "captions.csv", header: str = "file,caption") -> Path:
    rows = [f'{file},"a {colour} square"' for file, colour in COLOURS.items()]
    (folder / name).write_text("\n".join([header, *rows]), encoding="utf-8-sig")
    return folder


def with_jsonl(
    folder: Path, *, name: str = "captions.jsonl", file: str = "file", text: str = "caption"
) -> Path:
    rows = [json.dumps({file: key, text: f"a {colour} square"}) for key, colour in COLOURS.items()]
    (folder / name).write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return folder


def forms(folder: Path, form: str) -> Path:
    paint(folder)
    if form == "txt":
        return with_texts(folder)
    if form == "csv":
        return with_csv(folder)
    if form == "metadata.csv":
        return with_csv(folder, name="metadata.csv", header="File_Name, text")
    if form == "jsonl":
        return with_jsonl(folder)
    return with_jsonl(folder, name="metadata.jsonl", file="file_name", text="prompt")


@pytest.mark.parametrize("form", ["txt", "csv", "metadata.csv", "jsonl", "metadata.jsonl"])
def test_every_form_of_captions(tmp_path: Path, form: str) -> None:
    forms(tmp_path, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_dataset(tmp_path, 16)
    assert data.names == ["blue.webp", "green.jpg", "red.png"]
    assert data.captions == ["a blue square", "a lime square", "a red square"]
    assert data.images.shape == (3, 16, 16, 3)
    assert data.images[2, 8, 8].tolist() == [255, 0, 0]
    report = check(tmp_path)
    assert report.ok, str(report)
    assert report.usable == 3


def test_sub_folders_are_read_and_hidden_ones_are_not(tmp_path: Path) -> None:
    paint(tmp_path, {"a/b/red.png": "red", ".hidden/blue.png": "blue"})
    (tmp_path / "captions.csv").write_text("path,prompt\n./a/b/red.png,red thing\n")
    data = load_folder(tmp_path, 8)
    assert data.names == ["a/b/red.png"]
    assert data.captions == ["red thing"]


def test_a_table_wins_over_a_text_file(tmp_path: Path) -> None:
    with_csv(with_texts(paint(tmp_path)))
    (tmp_path / "red.txt").write_text("from the text file")
    (tmp_path / "readme.txt").write_text("not a caption")
    assert "a red square" in load_folder(tmp_path, 8).captions
    assert check(tmp_path).ok


def test_unicode_names_match_in_either_spelling(tmp_path: Path) -> None:
    composed, decomposed = (
        unicodedata.normalize("NFC", "café 🍎.png"),
        unicodedata.normalize("NFD", "café 🍎.png"),
    )
    paint(tmp_path, {decomposed: "red"})
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": composed, "caption": "Ein roter Apfel"}))
    assert load_folder(tmp_path, 8).captions == ["Ein roter Apfel"]


def damaged(folder: Path) -> Path:
    with_texts(paint(folder))
    (folder / "red.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "green.txt").unlink()
    (folder / "gone.txt").write_text("its picture is gone")
    (folder / "empty.txt").write_text(" \n")
    paint(folder, {"empty.png": "white"})
    return folder


def test_faulty_pictures_are_named_and_skipped(tmp_path: Path) -> None:
    damaged(tmp_path)
    with pytest.warns(UserWarning, match=r"4 problems.*empty\.txt: is empty.*green\.jpg.*red\.png"):
        data = load_folder(tmp_path, 8)
    assert data.names == ["blue.webp"]
    with pytest.raises(ValueError, match=r"4 problems.*red\.png"):
        load_folder(tmp_path, 8, strict=True)


def test_nothing_usable_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no captioned picture.*captions\.csv"):
        load_folder(tmp_path, 8)
    assert not check(tmp_path).ok
    with pytest.raises(FileNotFoundError, match=r"'/nowhere' is not a folder.*'emoji'"):
        load_dataset("/nowhere", 8)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        check("/nowhere")


def test_check_reports_every_fault(tmp_path: Path) -> None:
    damaged(tmp_path)
    paint(tmp_path, {"tiny.png": "black"}, side=10)
    paint(tmp_path, {"same.png": "blue", "again.png": "blue"}, side=100)
    for name in ("tiny", "same", "again"):
        (tmp_path / f"{name}.txt").write_text("red apple " * (30 if name == "tiny" else 1))
    report = check(tmp_path, size=32, context=16)
    assert not report.ok
    assert list(report.broken) == ["red.png"]
    assert report.missing_captions == ["empty.png", "green.jpg"]
    assert report.captions_without_picture == ["gone.txt"]
    assert len(report.problems) == 1
    assert report.too_small == {"tiny.png": (10, 20)}
    assert report.duplicates == [["again.png", "same.png"]]
    assert report.over_long == {"tiny.png": 60}
    assert report.shorter_sides == {"0-31": 1, "32-63": 3, "64-127": 2}
    assert report.usable == 4
    text = str(report)
    for part in (
        "7 pictures, 5 captions, 4 usable",
        "red.png",
        "green.jpg",
        "gone.txt",
        "empty.txt: is empty",
        "tiny.png: 10x20",
        "again.png = same.png",
        "60 tokens",
        "not ready",
    ):
        assert part in text


def test_check_shortens_long_lists(tmp_path: Path) -> None:
    paint(tmp_path, {f"{index:02d}.png": "red" for index in range(14)})
    text = str(check(tmp_path))
    assert "without a caption (skipped in training): 14" in text
    assert "and 4 more" in text


def test_check_counts_with_the_given_tokenizer(tmp_path: Path) -> None:
    with_texts(paint(tmp_path))
    tokenizer = train_tokenizer(["nothing alike"], 257)
    assert check(tmp_path, tokenizer=tokenizer).token_counts["red.png"] == len(" a red square")


@pytest.mark.parametrize(
    ("table", "content", "problem"),
    [
        ("captions.csv", "name,caption\nred.png,red", "line 2: has no file"),
        ("captions.csv", "file,caption\nred.png,", "line 2: has no caption"),
        ("captions.jsonl", '{"file": "red.png", "caption": "red"}\n{oops', "line 2: is not JSON"),
        ("captions.jsonl", "[1, 2]", "line 1: is not a JSON object"),
        ("captions.jsonl", '{"file": 3, "caption": "red"}', "line 1: has no file"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, table: str, content: str, problem: str) -> None:
    paint(tmp_path, {"red.png": "red"})
    (tmp_path / table).write_text(content)
    report = check(tmp_path)
    assert not report.ok
    assert any(f"{table} {problem}" in found for found in report.problems)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    paint(tmp_path, {"red.png": "red", "blue.png": "blue"})
    (tmp_path / "red.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "captions.csv").write_bytes(b"file,caption\n\xff,\xff")
    problems = check(tmp_path).problems
    assert ["red.txt: cannot be read as UTF-8" in problem for problem in problems] == [True, False]
    assert "captions.csv: cannot be read as UTF-8" in problems[1]


def test_a_row_without_its_picture_is_named(tmp_path: Path) -> None:
    with_csv(paint(tmp_path, {"red.png": "red"}))
    report = check(tmp_path)
    assert report.captions_without_picture == ["captions.csv: green.jpg", "captions.csv: blue.webp"]
    assert not report.ok


def test_pictures_are_cropped_to_the_middle(tmp_path: Path) -> None:
    image = np.zeros((16, 48, 3), dtype=np.uint8)
    image[:, 16:32] = 255
    Image.fromarray(image).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("the middle")
    assert (load_folder(tmp_path, 8).images == 255).all()
