from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wealy_ray.catalog import (
    MANIFEST_SCHEMA,
    manifest_from_folder,
    manifest_from_rows,
    read_manifest,
    validate,
    write_manifest,
)
from wealy_ray.errors import ManifestError
from wealy_ray.storage import Storage

SONGS = Path(__file__).parents[2] / "examples" / "songs"


def test_folder_lists_audio_with_versions(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.OGG").write_bytes(b"22")
    (tmp_path / "one.mp3").write_bytes(b"1")
    (tmp_path / "cover.jpg").write_bytes(b"no audio")
    table = manifest_from_folder(Storage(), str(tmp_path))
    rows = sorted(table.to_pylist(), key=lambda row: row["track_id"])
    assert [(r["track_id"], r["audio_uri"], r["size"]) for r in rows] == [
        ("b/two.OGG", f"{tmp_path}/b/two.OGG", 2),
        ("one.mp3", f"{tmp_path}/one.mp3", 1),
    ]
    assert all(r["etag"] for r in rows)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no audio files below"):
        manifest_from_folder(Storage(), str(tmp_path))


def test_sample_songs_become_a_manifest(tmp_path: Path) -> None:
    columns = {"audio_uri": "path", "clique_id": "lyrics_id"}
    table = manifest_from_rows(Storage(), str(SONGS / "manifest.jsonl"), columns)
    out = str(tmp_path / "manifest.parquet")
    write_manifest(Storage(), out, table)
    manifest = read_manifest(Storage(), out)
    assert len(manifest) == 24
    assert manifest.table.schema.equals(MANIFEST_SCHEMA)
    assert len(manifest.digest) == 64
    for row in manifest.table.to_pylist():
        assert Path(row["audio_uri"]).stat().st_size == row["size"]
        assert row["etag"].startswith("mtime-")
    truth = [json.loads(line) for line in (SONGS / "manifest.jsonl").read_text().splitlines()]
    assert manifest.table["clique_id"].to_pylist() == [t["lyrics_id"] for t in truth]  # null: a distractor


def test_csv_with_relative_paths_numbers_and_missing_objects(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"abc")
    (tmp_path / "list.csv").write_text(
        "track_id,audio_uri,clique_id,title\n7,x.wav,12,Caf\u00e9\n8,gone.wav,,\n", encoding="utf-8-sig"
    )
    table = manifest_from_rows(Storage(), str(tmp_path / "list.csv"), {})
    assert table["track_id"].to_pylist() == ["7", "8"]
    assert table["audio_uri"].to_pylist() == [f"{tmp_path}/x.wav", f"{tmp_path}/gone.wav"]
    assert table["clique_id"].to_pylist() == ["12", None]
    assert table["title"].to_pylist() == ["Caf\u00e9", None]
    assert table["size"].to_pylist() == [3, None]


GOOD = {"track_id": "a", "audio_uri": "/x/a.wav"}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([GOOD, GOOD], "track_id 'a' stands 2 times"),
        ([GOOD, {"track_id": " ", "audio_uri": "/b.wav"}], "row 2 has an empty track_id"),
        ([GOOD, {"track_id": None, "audio_uri": "/b.wav"}], "row 2 has an empty track_id"),
        ([{"track_id": "a", "audio_uri": ""}], "track 'a' has an empty audio_uri"),
        ([{"track_id": "a", "audio_uri": None}], "track 'a' has an empty audio_uri"),
        ([GOOD, {"track_id": "b", "audio_uri": "gopher://b.wav"}], "track 'b': unknown URI scheme 'gopher'"),
        (
            [GOOD, {"track_id": "b", "audio_uri": "s3://k:s@bkt/b.wav"}],
            "track 'b': a s3:// URI carries credentials",
        ),
        ([{"track_id": "a"}], "has no column 'audio_uri'"),
        ([{"audio_uri": "/a.wav"}], "has no column 'track_id'"),
        ([], "no tracks|no column"),
    ],
)
def test_broken_contracts_are_refused_with_the_id(tmp_path: Path, rows: list[dict], sentence: str) -> None:
    with pytest.raises(ManifestError, match=sentence):
        validate(pa.Table.from_pylist(rows), "m")
    out = tmp_path / "m.parquet"
    with pytest.raises(ManifestError, match=sentence):
        write_manifest(Storage(), str(out), pa.Table.from_pylist(rows))
    assert not out.exists()
    pq.write_table(pa.Table.from_pylist(rows), out)
    with pytest.raises(ManifestError, match=sentence):
        read_manifest(Storage(), str(out))


@pytest.mark.parametrize(
    ("name", "text", "columns", "sentence"),
    [
        ("m.jsonl", '{"track_id": 1}\nnope\n', {}, "line 2 is not valid JSON"),
        ("m.jsonl", "[1]\n", {}, "line 1 is not a JSON object"),
        ("m.jsonl", "\n", {}, "has no rows"),
        ("m.csv", "track_id,path\n1,a.wav\n", {}, "has no column 'audio_uri'; it has track_id, path"),
        (
            "m.csv",
            "track_id,path\n1,a.wav\n",
            {"audio_uri": "uri"},
            "has no column 'uri'; it has path, track_id",
        ),
        ("m.csv", "track_id,path\n1,a.wav\n", {"audio": "path"}, "'audio' is not a manifest column"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, text: str, columns: dict, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=sentence):
        manifest_from_rows(Storage(), str(tmp_path / name), columns)


def test_what_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist; make one with `wealy manifest`"):
        read_manifest(Storage(), str(tmp_path / "none.parquet"))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ManifestError, match="is not a Parquet manifest"):
        read_manifest(Storage(), str(tmp_path / "text.parquet"))
    pq.write_table(
        pa.table({"track_id": ["a"], "audio_uri": ["x"], "size": ["large"]}), tmp_path / "t.parquet"
    )
    with pytest.raises(ManifestError, match="column 'size' is string, not int64"):
        read_manifest(Storage(), str(tmp_path / "t.parquet"))


def test_folder_ids_do_not_depend_on_how_the_folder_is_spelt(tmp_path: Path) -> None:
    (tmp_path / "one.mp3").write_bytes(b"1")
    tables = [
        manifest_from_folder(Storage(), uri) for uri in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}")
    ]
    assert {t["track_id"][0].as_py() for t in tables} == {"one.mp3"}
    Storage().write("memory://spelt/one.mp3", b"1")
    assert manifest_from_folder(Storage(), "memory://spelt")["track_id"].to_pylist() == ["one.mp3"]


def test_file_uris_get_their_version_too(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"abc")
    (tmp_path / "list.csv").write_text(f"track_id,audio_uri\n1,file://{tmp_path}/x.wav\n")
    table = manifest_from_rows(Storage(), str(tmp_path / "list.csv"), {})
    assert table["audio_uri"].to_pylist() == [f"{tmp_path}/x.wav"]
    assert table["size"].to_pylist() == [3]


def test_json_strings_may_hold_other_line_ends(tmp_path: Path) -> None:
    row = {"track_id": "1", "audio_uri": "/x.wav", "title": "a\u2028b"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert manifest_from_rows(Storage(), str(tmp_path / "m.jsonl"), {})["title"].to_pylist() == ["a\u2028b"]


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp3")).write_bytes(b"1")
    with pytest.raises(ManifestError, match=r"caf\\udce9.mp3.* is not UTF-8; rename the file"):
        manifest_from_folder(Storage(), str(tmp_path))
