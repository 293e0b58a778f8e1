"""Tables of captions, and where pictures are looked for."""

import json
from pathlib import Path

import pytest

from data.captions import read_captions
from data.image_sources import LeftOut, find_sources
from data.image_text import read_image_text
from tests.image_text import image_text_folder, picture

WANTED = {"a.jpg": "a cat, sleeping", "b/c.png": "ein Gürteltier"}
TABLES = {
    "a.csv": 'file_name,text\r\na.jpg,"a cat, sleeping"\r\nb/c.png,ein Gürteltier\r\n',
    "a.tsv": "caption\tpath\na cat, sleeping\ta.jpg\nein Gürteltier\tb/c.png\n",
    "a.json": json.dumps([{"image": name, "prompt": text} for name, text in WANTED.items()]),
    "b.json": json.dumps(WANTED),
    "a.jsonl": "\n".join(json.dumps({"file": name, "caption": text}) for name, text in WANTED.items()) + "\n\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_any_kind(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(TABLES[name].encode(encoding))
    assert read_captions(tmp_path / name) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.parquet", "", r"no table of captions: give one that ends in \.csv, \.tsv, \.json, \.jsonl"),
        ("a.csv", "name,words\na,b\n", r"row 1 \(name, words\) needs one of file_name"),
        ("a.csv", "file_name,text\na.jpg\n", r"row 1 \(file_name, text\) needs one of"),
        ("a.csv", "file_name,text\na,b\na,b\na,c\n", "row 3 is another caption of a: give one"),
        ("a.json", "[3]", r"row 1 \(int\) needs one of"),
        ("a.json", '{"a.jpg": 3}', "row 1 .* both texts"),
        ("a.jsonl", "{", "cannot be read as captions"),
        ("a.json", "[" * 100_000, "cannot be read as captions"),
    ],
)
def test_what_is_no_table_is_one_line(name: str, text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=line) as error:
        read_captions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_line_ends_where_editors_end_it(tmp_path: Path) -> None:
    rows = [{"file": name, "caption": f"one\u2028two\x85{name}"} for name in WANTED]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_captions(tmp_path / "a.jsonl") == {row["file"]: row["caption"] for row in rows}


def test_a_table_goes_before_what_lies_beside_the_pictures(tmp_path: Path) -> None:
    """And half a letter in it, or in NAME.json, costs that picture alone."""
    for name, files in {"a": {"txt": b"old"}, "b": {}, "c": {"json": b'{"caption": "\\ud83d"}'}, "d": {}}.items():
        for kind, content in ({"png": picture(0)} | files).items():
            (tmp_path / f"{name}.{kind}").write_bytes(content)
    rows = [{"file": "a.png", "text": "new"}, {"file": "b.png", "text": "\ud83d"}, {"file": "d.png", "text": "d"}]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (source,) = find_sources(tmp_path, "*.tar", captions=str(tmp_path / "table.jsonl"))
    left_out = LeftOut()
    (batch,) = read_image_text(source, (16, 16), 4, left_out)
    assert (batch.keys, batch.captions) == (["a", "d"], ["new", "d"])
    assert [note.partition(" at ")[0] for note in left_out.notes] == [
        "sample b: the text is not UTF-8",
        "sample c: the text is not UTF-8",
    ]


def test_a_table_of_other_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "table.csv").write_text("path,text\n/data/a.png,a cat\n")
    with pytest.raises(ValueError, match=r"names /data/a\.png and no picture of .*: give paths below that folder"):
        find_sources(tmp_path, "*.tar", captions=str(tmp_path / "table.csv"))


def test_a_changed_file_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "gone.png").symlink_to("nowhere")
    before = [source.identity for source in find_sources(tmp_path, "*.tar")]
    assert before == [source.identity for source in find_sources(tmp_path, "*.tar")]
    (tmp_path / "a.txt").write_text("a small cat")
    assert before != [source.identity for source in find_sources(tmp_path, "*.tar")]


def test_shards_have_their_captions_in_them(tmp_path: Path) -> None:
    image_text_folder(tmp_path)
    with pytest.raises(ValueError, match="give no table of captions"):
        find_sources(tmp_path, "*.tar", captions="a.csv")


def test_files_are_grouped_by_name(tmp_path: Path) -> None:
    for name in ("b.v2.PNG", "b.v2.txt", "a.webp", "c.txt", "d.mp4", "e/f.jpeg", "e/g.jpg", "e/g.png", "e/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a cat" if name.endswith("txt") else picture(0))
    first, *others = find_sources(tmp_path, "*.tar", shard_size=2)
    left_out = LeftOut()
    samples = [sample for source in (first, *others) for sample in source.samples(left_out)]
    assert [(key, sorted(files)) for key, files in samples] == [
        ("a", ["webp"]),
        ("b.v2", ["png", "txt"]),
        ("e/f", ["jpeg"]),
        ("e/g.jpg", ["jpg", "txt"]),
        ("e/g.png", ["png", "txt"]),
    ]
    (tmp_path / "a.webp").unlink()
    batches = list(read_image_text(first, (16, 16), 4, left_out))
    assert [(batch.keys, batch.captions, batch.share) for batch in batches] == [(["b.v2"], ["a cat"], 0.5)]
    assert "sample a: [Errno 2] No such file" in left_out.notes[0]
