"""What every stage shares: the command line, reading documents, writing safely, logs, the process group.

Nothing here knows about models. torch is imported inside functions only, so that cleaning and packing workers
start in milliseconds.

Errors. Whatever a user typed or gave us raises ValueError with what is wrong, where (file:line) and the
remedy; `run` prints it and exits with status 2. Set TRACEBACK=1 to see the Python traceback as well.

Writing. Nobody ever sees half a file: `atomic_folder` and `atomic_text` write to NAME.tmp and rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gzip
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
import typing
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

# --- 1. command line ----------------------------------------------------------------------------------------


def run(*commands: Callable, doc: str = "") -> None:
    """Parse the command line for one command, or for several as subcommands, and call the one that was meant.

    A command is a function of one dataclass argument; the dataclass's fields are the flags (`vocab_size`
    becomes --vocab_size) and the comment on a field is its help. With several commands the function's name
    is the word the user types. `doc` is the module's docstring. Exit status: 0, 2 for a ValueError, 130 for
    Ctrl-C.
    """
    import tyro

    config_of = {f: next(iter(typing.get_type_hints(f).values())) for f in commands}
    if len(commands) == 1:
        union = config_of[commands[0]]
    else:
        named = (
            typing.Annotated[
                c, tyro.conf.subcommand(f.__name__, description=f.__doc__ or c.__doc__, prefix_name=False)
            ]
            for f, c in config_of.items()
        )
        union = typing.Union[tuple(named)]
    config = tyro.cli(union, description=doc, use_underscores=True)
    command = next(f for f, c in config_of.items() if type(config) is c)
    try:
        command(config)
    except ValueError as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(2)  # not sys.exit: another rank may still wait in a collective, and atexit would wait for it
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        os._exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os._exit(0)
    except RuntimeError as error:
        if not (lost := missing_ranks(error)):
            raise
        traceback.print_exc()
        names = ", ".join(map(str, lost))
        print(f"error: no sign of rank {names}: killed, stuck or cut off; --resume goes on", file=sys.stderr)
        sys.stdout.flush()
        os._exit(1)


def typed_flags(config) -> dict:
    """Give the fields of a dataclass whose flags stand on the command line, with their values."""
    flags = (word.split("=")[0] for word in sys.argv if word.startswith("--"))
    words = {flag.lstrip("-").replace("-", "_") for flag in flags}
    words |= {word.removeprefix("no_") for word in words}
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in words}


# --- 2. documents -------------------------------------------------------------------------------------------

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst", ".parquet")


def document_files(paths: typing.Iterable[str | Path]) -> list[Path]:
    """Files to read, in order: a file as given, a folder's text files sorted and recursively.

    ValueError for a path that does not exist, a folder without text files, an unknown suffix.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            files += inside
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise ValueError("no input files were given")
    return files


def _kind(path: Path) -> str:
    """Give "txt", "jsonl" or "parquet": a.jsonl.gz is jsonl, a.jsonl.txt is txt."""
    return path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]


def raw_documents(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, undecoded bytes) per document: cheap, so that workers can do the decoding.

    A .jsonl line is a document. In a .txt file an empty line ends a document (the convention of BERT's
    pretraining files). In a .parquet file a row's column "text" is a document, its number the row's, from 1.
    Memory is bounded by the longest document (.parquet: by 64 of them, .zst: plus the file's window).
    ValueError: a damaged .gz, .zst or .parquet, no column of text, a package that is missing.
    """
    kind = _kind(path)
    if kind == "parquet":
        yield from _parquet_rows(path)
        return
    start, lines = 1, []
    for n, line in enumerate(_lines(path), 1):
        if kind == "jsonl":
            if line.strip():
                yield n, line
        elif line.strip():
            start = start if lines else n
            lines.append(line)
        elif lines:
            yield start, b"".join(lines)
            lines = []
    if lines:
        yield start, b"".join(lines)


def _lines(path: Path) -> Iterator[bytes]:
    if path.name.endswith(".zst"):
        yield from _zstd_lines(path)
        return
    if not path.name.endswith(".gz"):
        with open(path, "rb") as file:
            yield from file
        return
    try:
        with gzip.open(path, "rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from None


def _zstd_lines(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path}: zstandard is not installed (pip install zstandard)") from None
    # zstandard's own file reader takes a cut file for a whole one, so the end of every frame is watched here
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` writes
    frame = decompressor.decompressobj()
    begun: list[bytes] = []  # parts of the line that is not complete
    try:
        with open(path, "rb") as file:
            while data := file.read(4096):  # small: 4 KB can hold 100 MB of equal bytes
                while data:
                    if frame.eof:
                        frame = decompressor.decompressobj()
                    *whole, rest = frame.decompress(data).split(b"\n")
                    for line in whole:
                        yield b"".join([*begun, line, b"\n"])
                        begun = []
                    begun.append(rest)
                    data = frame.unused_data
    except zstandard.ZstdError as error:
        raise ValueError(f"{path}: not a whole zstd file ({error})") from None
    if not frame.eof:
        raise ValueError(f"{path}: not a whole zstd file (it ends within a frame)")
    if last := b"".join(begun):
        yield last


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: pyarrow is not installed (pip install pyarrow)") from None
    try:
        # pages are read one after the other, not a row group at once; no threads, since packing forks
        with pq.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        ) as file:
            schema = file.schema_arrow
            if schema.names.count("text") != 1:
                found = ", ".join(map(repr, schema.names)) or "none"
                raise ValueError(f'{path}: needs one column "text"; its columns are {found}')
            kind = schema.field("text").type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary"):
                raise ValueError(f'{path}: the column "text" is {kind}, expected string')
            rows = (
                raw
                for batch in file.iter_batches(64, columns=["text"], use_threads=False)
                for raw in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist()
            )
            for n, raw in enumerate(rows, 1):
                if raw is None:
                    raise ValueError(f'{path}:{n}: "text" is null, expected a string')
                yield n, raw
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error})") from None


def parse_json_line(raw: bytes, where: str) -> dict:
    """Decode one line of a .jsonl file into a dict; ValueError says where and why it is not one."""
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets nested 1,000 deep
        raise ValueError(f"{where}: JSON that cannot be read ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def parse_document(raw: bytes, path: Path, line: int) -> str:
    """Turn the bytes of one document into text: the "text" of a JSON line or a row, or the lines of a .txt.

    ValueError names file:line: not UTF-8, not JSON, no "text" key, text that is not a string, a lone
    surrogate.
    """
    where, kind = f"{path}:{line}", _kind(path)
    if kind == "jsonl":
        row = parse_json_line(raw, where)
        if "text" not in row:
            raise ValueError(
                f'{where}: no "text" key; found {", ".join(map(repr, row)) or "an empty object"}'
            )
        text = row["text"]
        if not isinstance(text, str):
            raise ValueError(f'{where}: "text" is {type(text).__name__}, expected a string')
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f'{where}: "text" holds a lone surrogate, which is no Unicode text') from None
        return text
    try:
        text = raw.decode("utf-8-sig")
        return text if kind == "parquet" else text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], error.start
        if kind == "txt":  # a document of a .txt has many lines, and the number is that of its first
            before = error.object[:at].split(b"\n")
            where, at = f"{path}:{line + len(before) - 1}", len(before[-1])
        raise ValueError(f"{where}: not UTF-8 (byte {byte:#04x} at {at})") from None


def documents(paths: typing.Iterable[str | Path]) -> Iterator[str]:
    """Yield the text of every document in the given files and folders, one at a time."""
    for path in document_files(paths):
        for line, raw in raw_documents(path):
            yield parse_document(raw, path, line)


def ordered_map(function: Callable, tasks: typing.Iterable, workers: int, start: Callable, *args) -> Iterator:
    """Yield function(task) in the order of the tasks, from `workers` processes that first call start(*args).

    Few tasks are in flight: executor.map would read the whole corpus ahead. One worker is this process.
    """
    if workers == 1:
        start(*args)
        yield from map(function, tasks)
        return
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(workers, initializer=start, initargs=args) as pool:
        pending: deque = deque()
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def plain_bytes(files: list[Path]) -> int | None:
    """Sum up the sizes of uncompressed text files; None if one is compressed: the total is unknown."""
    plain = all(f.suffix in (".txt", ".jsonl") for f in files)
    return sum(f.stat().st_size for f in files) if plain else None


# --- 3. writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder FOLDER.tmp to write into; it becomes FOLDER when the block ends without error.

    ValueError if FOLDER exists and holds something, unless `overwrite`. After a failure nothing of FOLDER
    has changed.
    """
    folder = Path(folder)
    tmp, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # a kill between the two renames of `publish`
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another --out or remove it")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    publish(tmp, folder)


def publish(tmp: Path, folder: Path) -> None:
    """Put a finished folder in its place: contents reach the disk first, then one rename makes it visible."""
    for path in tmp.rglob("*"):  # files, and the folders that list them
        sync(path)
    sync(tmp)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        tmp.rename(folder)
        shutil.rmtree(old)
    else:
        tmp.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Force a file or a folder entry to the disk (fsync)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_text(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    sync(tmp)
    tmp.rename(path)


def write_json(path: str | Path, value) -> None:
    """Write readable JSON atomically, Chinese as Chinese."""
    atomic_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: str | Path):
    """Read a JSON file; ValueError names the file if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


# --- 4. what a run tells ------------------------------------------------------------------------------------


def progress(total: int | None, desc: str, unit: str, initial: int = 0):
    """A tqdm bar on stderr; where stderr is no terminal, at most one line in ten seconds."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        unit_scale=True,
        mininterval=interval,
        maxinterval=interval,
    )


def human(n: float) -> str:
    """Write a large number shortly: 193651200 -> '193.65M'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= size:
            return f"{n / size:.4g}{letter}"
    return f"{n:.4g}"


def duration(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    s = int(seconds)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"


def read_metrics(path: str | Path) -> list[dict]:
    """Read a metrics.jsonl. A last line cut by a crash is dropped."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_metrics(path: str | Path, curves: dict[str, str]) -> str | None:
    """Draw keys of a metrics.jsonl over its steps into PNG beside it (loss.png); returns why not, if not.

    `curves` maps a key of the log's lines to its label.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no loss.png: matplotlib is not installed (pip install matplotlib)"
    rows = read_metrics(path)
    figure, axes = plt.subplots(figsize=(8, 5))
    for key, label in curves.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, ms=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per pair" if any("pairs_per_second" in row for row in rows) else "nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    target = Path(path).with_name("loss.png")
    tmp = target.with_name("loss.png.tmp")
    tmp.write_bytes(buffer.getvalue())
    tmp.rename(target)
    return None


# --- 5. processes -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Process:
    """Which process this is: `rank` of `world`, computing on `device`."""

    rank: int
    world: int
    device: str

    @property
    def first(self) -> bool:
        """True on the one rank that prints and writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()


def start_process(device: str = "auto", timeout: float = 1800) -> Process:
    """Join torchrun's process group if there is one; device "auto" means a GPU if there is one.

    timeout: seconds after which a rank that waits for the others gives up.
    """
    import torch
    import torch.distributed as dist

    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here")
    device = "cpu" if device == "cpu" or not torch.cuda.is_available() else f"cuda:{local}"
    if device != "cpu":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # gloo: a socket to every other rank
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # gloo on GPUs too: weights that are kept in main memory (--offload) travel by it
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        limit = datetime.timedelta(seconds=timeout)
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        store = _fresh(store, rank, world, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return Process(rank, world, device)


def _fresh(store, rank: int, world: int, timeout: float):
    """Give a part of torchrun's store into which no earlier attempt has written.

    torchrun keeps one store when it starts the ranks anew (torch 2.13), and a rank would read addresses of
    those that were killed. So rank 0 invents a name, and tells it to those alone who ask by a number that
    they have just drawn.
    """
    import torch.distributed as dist

    mine, end = os.urandom(16).hex(), time.monotonic() + timeout
    if rank:
        store.set(f"question/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()  # waits for it
        store.set(f"heard/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, answered = set(range(1, world)), set()
    while missing:
        for other in sorted(missing):
            question = store.get(key).decode() if store.check([key := f"question/{other}"]) else None
            if question not in answered and question:
                store.set(f"answer/{question}", mine)
                answered.add(question)
            if store.check([f"heard/{mine}/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise ValueError(f"rank {', '.join(map(str, sorted(missing)))} did not start in {timeout:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def launcher() -> str:
    """Name the torchrun that started this process, as no other ever was or will be; "" without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    stat = Path(f"/proc/{os.getppid()}/stat")
    began = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""  # ticks since the boot
    return f"{socket.gethostname()} {os.getppid()} {began}"


def missing_ranks(error: RuntimeError, wait: float = 3.0) -> list[int]:
    """If a collective has failed here, which ranks do not say so too, within `wait` seconds?

    All that live notice within moments of one another; who is killed, frozen or cut off says nothing.
    """
    import torch.distributed as dist

    collective = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    if not collective or not dist.is_initialized():
        return []
    store, lost = dist.distributed_c10d._get_default_store(), list(range(dist.get_world_size()))
    try:
        store.set(f"gave_up/{dist.get_rank()}", "")
        end = time.monotonic() + wait
        while lost and time.monotonic() < end:
            time.sleep(0.1)
            lost = [rank for rank in lost if not store.check([f"gave_up/{rank}"])]
    except RuntimeError:  # the launcher, which keeps the store, is gone
        return []
    return lost


def finish_process(code: int = 0) -> None:
    """Leave the process group and exit with `code`; without a group return if the code is 0.

    Under gloo a plain exit may abort after all work is done (pytorch#190489), hence os._exit.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class Lap:
    """Measures a stretch of work on a device: begins when it is made, ends at end()."""

    def __init__(self, device: str):
        self.events = None
        if device.startswith("cuda"):  # the host runs ahead, so the GPU notes the times itself
            import torch

            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        self.times = [time.perf_counter()]

    def end(self) -> None:
        """Mark the end; waits for nothing."""
        self.times.append(time.perf_counter())
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """Give the length; waits until the GPU has come to the end."""
        if not self.events:
            return self.times[1] - self.times[0]
        begin, end = self.events
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def best_dtype(device: str):
    """Give the torch.dtype to compute in: bf16 on a GPU or a CPU with bf16 units, else fp32."""
    import torch

    fast = (
        device.startswith("cuda")
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if fast else torch.float32


class Stopped(Exception):
    """Raised on all ranks at once where the run was asked to stop in the midst of something."""


class StopSignal:
    """Notices Ctrl-C, SIGTERM, SIGHUP, and the launcher's death, so that the loop can save and stop in order.

    A second Ctrl-C stops at once. `exit_code` is what the shell expects of a process ended so.
    """

    def __init__(self, process: Process):
        self.process = process
        self.asked = False
        self.exit_code = 0
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None  # torchrun
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # SIGHUP: a terminal that was closed
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.exit_code = True, 128 + number

    def __bool__(self) -> bool:
        return self.asked or (self.launcher is not None and os.getppid() != self.launcher)

    def agreed(self) -> bool:
        """Tell whether any rank was asked to stop; all ranks call this, and all hear the same."""
        if self.process.world == 1:
            return bool(self)
        import torch
        import torch.distributed as dist

        asked = torch.tensor(float(bool(self)), device=self.process.device)
        dist.all_reduce(asked)
        return bool(asked)

    def poll(self) -> None:
        """Raise Stopped on all ranks if any was asked to stop; for the midst of an evaluation."""
        if self.agreed():
            raise Stopped


def peak_memory(device: str) -> int:
    """Peak memory in bytes: of the GPU's allocator, or the process's resident set on a CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:  # on Linux; ru_maxrss there counts what the process was before exec, too: its parent
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
