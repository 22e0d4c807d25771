"""Documents come out of every kind of file alike; a damaged file is named, and memory stays small."""

import gzip
import json
import random
from pathlib import Path

import pytest
from conftest import run_script

import common

TEXTS = ["第一\n第二行", "  a\tb ", "x" * 5000, "😀", *(f"{n} 白纸" for n in range(3000))]
JSONL = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
TXT = b"one\ntwo\n\n\nthree\r\n\n"


@pytest.fixture
def zstd():
    return pytest.importorskip("zstandard")


@pytest.fixture
def parquet():
    """Give a function path, column (values or array), **options that writes a table with a column "text"."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def write(path, column, name="text", **options):
        table = pa.table({"id": list(range(len(column))), name: column})
        pq.write_table(table, path, **{"row_group_size": 700, "write_page_checksum": True} | options)
        return path

    return write


def texts_of(path):
    return list(common.documents([path]))


# --- 1. the kind of a file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "txt"),
        ("a.jsonl", "jsonl"),
        ("a.jsonl.txt", "txt"),
        ("a.txt.jsonl", "jsonl"),
        ("a.jsonl.txt.gz", "txt"),
        ("a.parquet.txt", "txt"),
        ("a.jsonl.old.jsonl.gz", "jsonl"),
    ],
)
def test_the_last_suffix_decides_what_a_file_is(tmp_path, name, kind):
    raw = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert texts_of(tmp_path / name) == (["a", "b"] if kind == "jsonl" else [raw.decode().strip()])


@pytest.mark.parametrize("name", ["a.jsonl.bak", "a.csv", "a.zst", "a.parquet.gz", "a.json"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=f"{name}: unknown kind of file; expected one of .txt, .*.parquet"):
        common.document_files([tmp_path / name])


def test_a_folder_gives_all_its_kinds_sorted(tmp_path, zstd, parquet):
    (tmp_path / "a.txt").write_bytes(b"1\n")
    (tmp_path / "b.jsonl.zst").write_bytes(zstd.compress(b'{"text": "2"}'))
    parquet(tmp_path / "c.parquet", ["3", "4"])
    (tmp_path / "d.txt.zst").write_bytes(zstd.compress(b"5\n\n6"))
    (tmp_path / "e.md").write_text("not read")
    assert texts_of(tmp_path) == ["1", "2", "3", "4", "5", "6"]


# --- 2. zstd --------------------------------------------------------------------------------------------------


def test_zstd_holds_the_documents_of_the_plain_file(tmp_path, zstd):
    c = zstd.ZstdCompressor(write_checksum=True)
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a skippable frame, as pzstd writes
    whole = {
        "one frame": c.compress(JSONL),
        "frames that end within a line, one empty, one skippable": skipped
        + c.compress(JSONL[:7001])
        + c.compress(b"")
        + skipped
        + c.compress(JSONL[7001:]),
        "no newline at the end": c.compress(JSONL[:-1]),
    }
    for name, raw in whole.items():
        (tmp_path / "a.jsonl.zst").write_bytes(raw)
        assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS, name
    (tmp_path / "a.txt").write_bytes(TXT)
    (tmp_path / "b.txt.zst").write_bytes(c.compress(TXT))
    assert texts_of(tmp_path / "a.txt") == texts_of(tmp_path / "b.txt.zst") == ["one\ntwo", "three"]
    assert [n for n, _ in common.raw_documents(tmp_path / "b.txt.zst")] == [1, 5]


def test_a_bad_line_within_zstd_is_named_by_its_number(tmp_path, zstd):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(b'{"text": "a"}\n\n{"txet": 1}\n'))
    with pytest.raises(ValueError, match='a.jsonl.zst:3: no "text" key'):
        texts_of(tmp_path / "a.jsonl.zst")


def test_damaged_zstd_is_named_wherever_it_is_cut(tmp_path, zstd):
    raw = zstd.ZstdCompressor(write_checksum=True).compress(JSONL)
    path = tmp_path / "a.jsonl.zst"
    flipped = bytearray(raw)
    flipped[-6] ^= 0xFF
    cuts = [raw[:n] for n in (0, 1, 5, len(raw) // 2, len(raw) - 1)]
    for damaged in (*cuts, bytes(flipped), raw + b"garbage", b"this is no zstd"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.jsonl.zst: not a whole zstd file"):
            texts_of(path)


# --- 3. parquet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_parquet_rows_are_documents_whatever_the_column_is_made_of(tmp_path, parquet, kind):
    pa = pytest.importorskip("pyarrow")
    column = pa.array([t.encode() for t in TEXTS] if kind == "binary" else TEXTS)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind != "binary":
        column = column.cast(getattr(pa, kind)())
    path = parquet(tmp_path / "a.parquet", column)
    assert texts_of(path) == TEXTS
    assert [n for n, _ in common.raw_documents(path)] == list(range(1, len(TEXTS) + 1))


def test_a_parquet_document_keeps_its_empty_lines_and_its_end(tmp_path, parquet):
    documents = ["a\n\nb\n", "", "\n", "c\r\n"]
    assert texts_of(parquet(tmp_path / "a.parquet", documents)) == documents


@pytest.mark.parametrize(
    ("column", "name", "message"),
    [
        (["a", None, "c"], "text", ':2: "text" is null, expected a string'),
        ([1, 2], "text", ': the column "text" is int64, expected string'),
        ([["a"]], "text", ': the column "text" is list<.*string.*>, expected string'),
        (["a"], "content", ": needs one column \"text\"; its columns are 'id', 'content'"),
        ([b"ok", b"\xe7\x99\xbd\n\xff"], "text", r":2: not UTF-8 \(byte 0xff at 4\)"),
    ],
)
def test_a_column_that_is_no_text_is_named_with_its_place(tmp_path, parquet, column, name, message):
    with pytest.raises(ValueError, match=f"a.parquet{message}"):
        texts_of(parquet(tmp_path / "a.parquet", column, name))


def test_damaged_parquet_is_named(tmp_path, parquet):
    path = parquet(tmp_path / "a.parquet", TEXTS, compression="none")
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[raw.index("第二行".encode())] ^= 0xFF
    for damaged in (b"", raw[:3], raw[: len(raw) // 2], raw[:-1], bytes(flipped), b"this is no parquet"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.parquet: not a whole parquet file"):
            texts_of(path)


# --- 4. memory, and packages that are missing ------------------------------------------------------------------

PEAK = """
import resource, sys, common
from pathlib import Path
if sys.argv[1].endswith("parquet"):
    import pyarrow.parquet
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
count = sum(1 for _ in common.raw_documents(Path(sys.argv[1])))
print(count, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["zst", "parquet"])
def test_reading_a_large_file_takes_little_memory(tmp_path, kind, zstd, parquet):
    """40,000 documents of 2 KB are 80 MB; one row group, one frame."""
    draw = random.Random(0)
    documents = [draw.randbytes(20).hex() * 50 for _ in range(40_000)]
    if kind == "parquet":
        options = {"row_group_size": 10**6, "use_dictionary": False, "compression": "none"}
        path = parquet(tmp_path / "a.parquet", documents, **options)
    else:
        path = tmp_path / "a.txt.zst"
        path.write_bytes(zstd.compress("\n\n".join(documents).encode()))
    done = run_script("-c", PEAK, path)
    assert done.returncode == 0, done.stderr
    count, kilobytes = map(int, done.stdout.split())
    print(f"{kilobytes} KB")  # measured: 4 MB (zst), 35 MB (parquet, the same for a tenth of the rows)
    assert count == 40_000 and kilobytes < 60_000


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_pip_line(tmp_path, name, package):
    (tmp_path / name).write_bytes(b"x")
    code = (
        f"import sys; sys.modules[{package!r}] = None; import common; list(common.documents([sys.argv[1]]))"
    )
    done = run_script("-c", code, tmp_path / name)
    assert f"ValueError: {tmp_path / name}: {package} is not installed (pip install {package})" in done.stderr
