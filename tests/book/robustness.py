# SPDX-License-Identifier: MIT-0
"""What can go wrong around a run, done to real runs: ranks are killed, disks are full, ports are
taken, one core is left, names are odd. Half an hour on two cores; no part of `make test`.

    make robustness                                      all of that, written to
        notebooks/results/00_robustness.json
    make robustness CHAPTER=02 ARGS=--kills              one part, one chapter; printed only
    make robustness PY=python3.12 ARGS=--environment     does this Python with its torch run the
        book?

Each case says what was done, what was demanded and what was seen. A verdict is "ok" only where all
that was demanded was seen in this run; what this machine cannot do is "skipped", with the reason.
Needs Linux (/proc).
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import scripts
import shared_blocks
import torch
from safetensors import safe_open

ROOT = shared_blocks.ROOT
KEPT = ROOT / "notebooks" / "results" / "00_robustness.json"
SCRIPTS = {path.parent.name[:2]: path for path in shared_blocks.chapters()}
PRETRAIN = ROOT / "02_megatron_tp/pretrain.py"  # and chapter 2's
SPEECH = ROOT / "01_deepspeech/speech.py"  # chapter 1's tool, which reads and writes its files
ODD = "größe – 数 ✓ x"  # a name with letters outside ASCII, and spaces
COMMAND = "make robustness, and once in each environment make robustness PY=... ARGS=--environment"
TORCHRUN = ("-m", "torch.distributed.run")

Row = namedtuple("Row", "case demanded seen verdict")  # verdict: True, False, or why it was skipped


class Cannot(Exception):
    """This machine cannot do what a case needs."""


# ── A run, and all its processes ──────────────────────────────────────────────────────────────────
#
# torchrun gives each rank a session of its own, so no process group and no parent holds a run
# together once torchrun is dead. What every process of a run inherits is its environment: a mark
# there finds them all, orphans too.


class Run:
    """A started script: the lines that it has printed, its processes, and how it ends."""

    def __init__(self, process: subprocess.Popen, mark: str):
        self.process, self.mark, self.out, self.err = process, mark.encode(), [], []
        pipes = (process.stdout, self.out), (process.stderr, self.err)
        self.readers = [
            threading.Thread(target=self._read, args=pair, daemon=True) for pair in pipes
        ]
        for reader in self.readers:
            reader.start()

    @staticmethod
    def _read(pipe, lines: list[str]) -> None:
        for line in pipe:
            lines.append(line)

    def processes(self) -> dict[int, dict[str, str]]:
        """Number of each living process to its environment. One that has ended and only waits to be
        asked for its exit code has none, and is not among them."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and self.mark in (
                    words := (folder / "environ").read_bytes()
                ):
                    pairs = (
                        word.partition("=") for word in words.decode(errors="replace").split("\0")
                    )
                    found[int(folder.name)] = {name: value for name, _, value in pairs}
        return found

    def ranks(self) -> dict[int, int]:
        """Rank to process, as soon as all of them are there."""
        found: dict[int, int] = {}

        def all_there() -> bool:
            here = {pid: words for pid, words in self.processes().items() if "RANK" in words}
            found.update({int(words["RANK"]): pid for pid, words in here.items()})
            return len(found) == int(next(iter(here.values()), {}).get("WORLD_SIZE", -1))

        self.until(all_there, pause=0.02)
        return found

    def until(
        self, condition: Callable[[], bool], seconds: float = 120, pause: float = 0.002
    ) -> None:
        """Waits for a condition. Raises TimeoutError, also where the run ends before it comes
        true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(
                    f"the moment never came; the run's last words: {self.last_words()}"
                )
            time.sleep(pause)

    def printed(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.out[:])

    def end(self, seconds: float) -> tuple[float, int | None, int]:
        """Seconds until the script ended, its exit code (None: it did not), and the number of
        processes that are left a second later: a helper of Python's multiprocessing ends when it
        notices that its parent has."""
        begin = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        took, code = time.monotonic() - begin, self.process.returncode
        while (left := len(self.processes())) and time.monotonic() < begin + took + 1:
            time.sleep(0.05)
        self.kill()
        return took, code, left

    def kill(self) -> None:
        """Ends whatever is left of the run."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()
        for reader in self.readers:
            reader.join()

    def named(self) -> str:
        """Which rank torchrun's last words name as the first that failed, and by what."""
        last = "".join(self.err).rpartition("Root Cause")[2]
        rank = re.search(r"rank\s*: (\d+)", last)
        return f"rank {rank[1]}{', SIGKILL' * ('SIGKILL' in last)}" if rank else "no rank"

    def last_words(self) -> str:
        lines = [line.strip() for line in self.err[:] if line.strip()]
        return lines[-1] if lines else "none"

    def error(self) -> str:
        """The line that says what was wrong: argparse's, or the last one of a Python traceback."""
        found = [
            match[0] for line in self.err if (match := re.search(r"\b(\w*Error|error): .*", line))
        ]
        return found[-1] if found else self.last_words()


@contextlib.contextmanager
def started(*command: str, **options) -> Iterator[Run]:
    """`python *command`; however the block is left, all its processes are ended, also those that it
    did not end itself. Where this process is killed, the script is asked to stop
    (PR_SET_PDEATHSIG), and torchrun stops its ranks."""
    os.environ["ROBUSTNESS_RUN"] = uuid.uuid4().hex
    prepare = options.pop("prepare", lambda: None)
    die_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM)
    options["preexec_fn"] = lambda: (die_with_parent(), prepare())
    with scripts.started(*map(str, command), **options) as process:
        run = Run(process, f"ROBUSTNESS_RUN={os.environ['ROBUSTNESS_RUN']}")
        try:
            yield run
        finally:
            run.kill()


def whole(*command: str, seconds: float = 240, **options) -> Run:
    """A run from its beginning to its end; `code`, `took` and `left` say how it ended."""
    with started(*command, **options) as run:
        run.took, run.code, run.left = run.end(seconds)
    return run


# ── Ranks that are killed ─────────────────────────────────────────────────────────────────────────
#
# Chapter by chapter, at moments that are found by what a run shows of itself:
#
#   before the group    the processes exist; none has opened a socket yet
#   as they meet        this rank has opened its first socket, to the store at which ranks find
#                       each other
#   in a step           the head of the table of losses is printed; then up to two seconds more
#   at the end          rank 0 is stopped (SIGSTOP) behind the last collective of the demonstration,
#                       on its way to the last barrier; the others have a second or two to get
#                       there, and wait
#   while it writes     a file appears, or changes, in the folder that rank 0 writes to
#
# Which rank, and when within the moment, is drawn from --seed.

TIMEOUT = 30  # --timeout of these runs
BOUND = 30  # seconds within which everything must have ended behind a kill
# The last line that a chapter's demonstration prints; where it is not named here, the claims' head.
LAST_LINE = {"01": "^spoken ", "02": "^loss on the eval split", "03": "^   4 ", "04": "^   4 "}
SHORT = ["--steps", 5]
LONG = {"08": 100}  # it trains alone first, three times as long as the ranks together
MOMENTS = ("before the group", "as they meet", "in a step", "at the end")


def killed(chapter: str, moment: str, dice: random.Random) -> Row:
    """One rank of one run is killed at one moment."""
    flags = SHORT if moment == "at the end" else ["--steps", LONG.get(chapter, 1_000_000)]
    case = f"chapter {chapter}: a rank killed {moment}"
    for _ in range(3):  # a rank may have ended by itself before the kill arrives
        with started(SCRIPTS[chapter], *flags, "--timeout", TIMEOUT) as run:
            ranks = run.ranks()
            victim = dice.choice(sorted(ranks))
            wait_for(moment, run, ranks, victim, chapter, dice)
            try:
                os.kill(ranks[victim], signal.SIGKILL)
            except ProcessLookupError:
                continue
            if moment == "at the end":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(ranks[0], signal.SIGCONT)
            return judged(case, run, victim, len(ranks))
    raise TimeoutError("three times the run had ended before the kill")


def wait_for(
    moment: str, run: Run, ranks: dict[int, int], victim: int, chapter: str, dice: random.Random
) -> None:
    if moment == "before the group":
        time.sleep(dice.uniform(0, 0.5))
        if sockets(ranks[victim]):
            raise TimeoutError("it had opened a socket already")
    elif moment == "as they meet":
        run.until(lambda: sockets(ranks[victim]) > 0)
        time.sleep(dice.uniform(0, 0.1))
    elif moment == "in a step":
        run.until(lambda: run.printed(r"^step "))
        time.sleep(dice.uniform(0, 2))
    else:
        run.until(lambda: run.printed(LAST_LINE.get(chapter, "^claim ")))
        os.kill(ranks[0], signal.SIGSTOP)
        time.sleep(dice.uniform(1, 2))


def sockets(pid: int) -> int:
    count = 0
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                count += os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:")
    return count


def judged(case: str, run: Run, victim: int, world: int) -> Row:
    took, code, left = run.end(BOUND + 30)
    demanded = (
        f"over in {BOUND} s, exit code not 0, rank {victim} of {world} named, no process left"
    )
    seen = f"{took:.1f} s, exit code {code}, {run.named()}, {left} left"
    good = took <= BOUND and code not in (0, None) and not left
    good = good and run.named() == f"rank {victim}, SIGKILL"
    return Row(case, demanded, seen if good else f"{seen}; last: {run.last_words()}", good)


def writer(chapter: str) -> Path:
    """The script of a chapter that reads and writes files."""
    return {"01": SPEECH, "02": PRETRAIN}.get(chapter, SCRIPTS[chapter])


def killed_while_writing(
    chapter: str, first: Run, flags: list, file: Path, loads: Callable[[], Run], dice
) -> Row:
    """Rank 0 is killed while it replaces `file`, which `first` has written; what then stands there
    must load."""
    case = f"chapter {chapter}: rank 0 killed while it writes {flags[-2]}"
    if first.code != 0:
        return Row(case, "", f"the first file was not written: {first.error()}", False)
    before = file.stat()

    def writes() -> bool:
        now = file.stat()
        replaced = (now.st_ino, now.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
        return replaced or len(os.listdir(file.parent)) > 1

    with started(writer(chapter), *flags, "--timeout", TIMEOUT) as run:
        ranks = run.ranks()
        run.until(writes)
        time.sleep(dice.uniform(0, 0.02))
        os.kill(ranks[0], signal.SIGKILL)
        row = judged(case, run, 0, len(ranks))
    half = [path.name for path in file.parent.iterdir() if path != file]
    again = loads()
    found = "loads" if again.code == 0 else again.error()
    seen = f"; beside it {half[0] if half else 'nothing'}; it {found}"
    return Row(
        case,
        row.demanded + "; the file loads",
        row.seen + seen,
        row.verdict is True and again.code == 0,
    )


def kills(chapters: list[str], dice: random.Random) -> Iterator[Row]:
    for chapter in chapters:
        for moment in MOMENTS:
            yield attempt(
                f"chapter {chapter}: a rank killed {moment}", killed, chapter, moment, dice
            )
    with tempfile.TemporaryDirectory() as folder:
        if "02" in chapters:
            file = Path(folder, "run", "run.safetensors")
            file.parent.mkdir()
            flags = ["--hidden-size", 512, "--seq-length", 32, "--batch", 4, "--save-every", 1]
            flags += ["--decay-steps", 1000, "--checkpoint", file]
            first = whole(PRETRAIN, *flags, "--steps", 1)

            def again() -> Run:
                with safe_open(file, "pt") as data:
                    step = json.loads(data.metadata()["run"].split(" ", 1)[1])["step"]
                return whole(PRETRAIN, "--steps", step, "--ranks", 1, *flags)

            longer = ["--steps", 1000, *flags]
            yield attempt(
                "chapter 02", killed_while_writing, "02", first, longer, file, again, dice
            )
        if "01" in chapters:
            file, sound = Path(folder, "model", "model.safetensors"), Path(folder, "a.wav")
            file.parent.mkdir()
            a_sound(sound)
            large = '{"hidden_size": 1024, "num_layers": 3}'
            flags = ["--steps", 1, "--beam", 1, "--model", large, "--save", file]
            first = whole(SPEECH, *flags)
            again = partial(whole, SPEECH, "--load", file, "--transcribe", sound)
            yield attempt("chapter 01", killed_while_writing, "01", first, flags, file, again, dice)


def attempt(case: str, function: Callable[..., Row], *args) -> Row:
    """A case that could not even be brought about is no success."""
    try:
        return function(*args)
    except (TimeoutError, OSError) as error:
        return Row(case, "", str(error), False)
    except Cannot as reason:
        return Row(case, "", "", f"skipped: {reason}")


def a_sound(path: Path) -> None:
    import soundfile

    soundfile.write(
        path, torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy() / 10, 8000
    )


# ── Disks that are full, and folders that cannot be written ───────────────────────────────────────
#
# Of whatever is written, either the whole stands there afterwards or what stood there before, and
# an error names the file. What can be known before the ranks start is one line then. A full disk is
# a file system of a few KB in memory (tmpfs), which root can mount; for others it is a limit on the
# size of files (RLIMIT_FSIZE), which fails the same write with another number. Root may write to
# any folder, so a read-only one is such a file system, too.

FEW = ["--steps", 2]
SMALL = ["--num-layers", 1, "--hidden-size", 32, "--num-heads", 4, "--seq-length", 32]
TINY = {"01": [*FEW, "--beam", 1], "02": [*FEW, *SMALL, "--decay-steps", 2]}
OWN_TEXT = ("03", "04", "07", "11", "12")  # chapters that read no file but their own
WRITES = {"run.safetensors": ("--checkpoint", "02"), "model.safetensors": ("--save", "01")}


def tiny(chapter: str) -> list:
    return TINY.get(chapter, FEW)


@contextlib.contextmanager
def disk(kilobytes: int | None = None) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder, and a function that makes it read-only."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid():
            yield Path(folder), partial(os.chmod, folder, 0o555)
            os.chmod(folder, 0o755)
            return
        size = f"size={kilobytes}k" if kilobytes else "size=64m"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, text=True
        )
        if mounted.returncode:
            raise Cannot(f"mount: {mounted.stderr.strip()}")
        try:
            yield (
                Path(folder),
                lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True),
            )
        finally:
            subprocess.run(["umount", folder], check=True)


def contents(folder: Path) -> dict[str, str]:
    """Name to checksum of each file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def read_only(flag: str, chapter: str, name: str) -> Row:
    with disk() as (folder, lock):
        lock()
        run = whole(writer(chapter), *tiny(chapter), flag, folder / name)
    return one_line(f"{flag} in a read-only folder", run, folder / name)


def one_line(case: str, run: Run, path: Path) -> Row:
    """What is wrong is one line before any rank starts: argparse's, and its exit code."""
    seen = (
        f"exit code {run.code}, {len(run.err)} lines, {run.left} left: {short(run.error(), path)}"
    )
    good = run.code == 2 and len(run.err) == 2 and not run.left and str(path) in run.err[-1]
    return Row(case, "exit code 2, usage and one line that names the file", seen, good)


def short(error: str, path: Path) -> str:
    """Without the names of temporary folders, which differ from run to run."""
    return re.sub(r"/tmp/\w+", "…", error.replace(str(path), path.name))


def full(flag: str, chapter: str, name: str, older: bool) -> Row:
    """With `older`, a file stands there that was written when there was room."""
    case = f"{flag} {name} on a full disk" + ", an older one there" * older
    with disk() as (room, _):
        size = 0
        if older:
            flags = (
                tiny(chapter)
                if flag != "--checkpoint"
                else [*tiny(chapter), "--save-every", 1, "--steps", 1]
            )
            first = whole(writer(chapter), *flags, flag, room / name)
            if first.code != 0:
                return Row(case, "", first.error(), False)
            size = (room / name).stat().st_size // 1024
        with disk(size + 32) as (folder, _):
            if older:
                shutil.copy(room / name, folder / name)
            before, limit = contents(folder), (size + 32) * 1024
            options = {}
            if os.geteuid():
                options["prepare"] = lambda: resource.setrlimit(
                    resource.RLIMIT_FSIZE, (limit // 2, limit)
                )
            run = whole(writer(chapter), *tiny(chapter), flag, folder / name, **options)
            after = contents(folder)
    error = run.error()
    what = (
        "what was there"
        if after == before
        else f"{sorted(after)}, not what was there: {sorted(before)}"
    )
    seen = f"exit code {run.code}, {run.left} left, {what}: {short(error, folder / name)}"
    good = run.code not in (0, None) and not run.left and after == before and name in error
    return Row(
        case, "exit code not 0, an error that names the file, the folder as it was", seen, good
    )


def disks(chapters: list[str], dice: random.Random) -> Iterator[Row]:
    for name, (flag, chapter) in WRITES.items():
        if chapter in chapters:
            yield attempt(f"{flag} in a read-only folder", read_only, flag, chapter, name)
            missing = Path(tempfile.gettempdir(), uuid.uuid4().hex, name)
            run = whole(writer(chapter), *tiny(chapter), flag, missing)
            yield one_line(f"{flag} in no folder", run, missing)
            for older in (False, True):
                yield attempt(f"{flag} on a full disk", full, flag, chapter, name, older)
    if "02" in chapters:
        yield unprinted()


def unprinted() -> Row:
    """The shell's `> file` on a full disk, for which Linux has a file that is always full."""
    program = "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); "
    program += "sys.argv[0] = sys.executable; os.execv(sys.executable, sys.argv)"
    run = whole("-c", program, SCRIPTS["02"], "--check")
    seen = f"exit code {run.code}, {run.left} left: {run.error()}"
    good = run.code not in (0, None) and not run.left and "No space left" in run.error()
    return Row(
        "standard output on a full disk", "exit code not 0, an error that says so", seen, good
    )


# ── Ports that are taken ──────────────────────────────────────────────────────────────────────────
#
# A plain start asks for no port: its torchrun takes a free one. Where a port is named and taken,
# the end must be clear and in time; what says it is torchrun, not the chapter.


@contextlib.contextmanager
def taken(port: int = 0) -> Iterator[int]:
    """A port at which somebody listens and never answers."""
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:  # somebody has it already, which is as good
            yield port
            return
        listener.listen()
        yield listener.getsockname()[1]


def ports(chapters: list[str], dice: random.Random) -> Iterator[Row]:
    chapter = chapters[0]
    check = [SCRIPTS[chapter], "--check", "--timeout", TIMEOUT]
    with taken(29500):
        yield succeeds("a plain start, port 29500 taken", whole(*check))
    with started(*check) as one, started(*check) as other:
        codes = [run.end(240)[1] for run in (one, other)]
    yield Row("two plain starts at once", "exit codes 0", f"exit codes {codes}", codes == [0, 0])
    for what, flags in (
        ("torchrun --master-port taken", ["--master-port={}"]),
        ("torchrun --rdzv-endpoint taken", ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:{}"]),
    ):
        with taken() as port:
            flags = [flag.format(port) for flag in flags]
            with started(*TORCHRUN, "--nnodes=1", "--nproc-per-node=2", *flags, *check) as run:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(90)
                begun = sum("RANK" in words for words in run.processes().values())
                _, code, left = run.end(0)
        end = "no end in 90 s" if code is None else f"exit code {code}"
        error = (
            run.error().replace(str(port), "PORT")
            if code is not None
            else f"{begun} ranks were started"
        )
        good = code not in (0, None) and not left and str(port) in "".join(run.err)
        if (
            code is None and not begun
        ):  # torchrun speaks to whoever listens there, and waits for an answer
            good = "torchrun's own: it never comes to the chapter; take a free port"
        yield Row(
            what,
            "over in 90 s, exit code not 0, an error that names the port",
            f"{end}: {error}",
            good,
        )


# ── One core, and odd names ───────────────────────────────────────────────────────────────────────


def core(chapters: list[str], dice: random.Random) -> Iterator[Row]:
    """Default runs on a single core: two or four ranks take turns, and no collective may time
    out."""
    one = {min(os.sched_getaffinity(0))}
    for chapter in chapters:
        run = whole(SCRIPTS[chapter], prepare=lambda: os.sched_setaffinity(0, one))
        yield succeeds(f"chapter {chapter} on one core", run, seconds=180)


def succeeds(case: str, run: Run, seconds: float | None = None) -> Row:
    demanded = (
        f"over in {seconds} s, exit code 0, no process left"
        if seconds
        else "exit code 0, no process left"
    )
    seen = (
        f"{run.took:.0f} s, " * bool(seconds)
        + f"exit code {run.code}, {run.left} left{failed(run)}"
    )
    return Row(
        case, demanded, seen, run.code == 0 and not run.left and run.took <= (seconds or run.took)
    )


def failed(run: Run) -> str:
    """What there is to say of a run that should have succeeded."""
    return "" if run.code == 0 else f": {run.error()}"


def names(chapters: list[str], dice: random.Random) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside, ODD)
        folder.mkdir()
        for chapter in chapters:
            if chapter in OWN_TEXT:
                continue
            yield attempt(f"chapter {chapter}: files of odd names", odd_files, chapter, folder)
        listed = subprocess.check_output(
            ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"]
        )
        for name in os.fsdecode(listed).split("\0"):  # what git tracks, and what is new
            if (ROOT / name).is_file():
                (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / "clone" / name)
        chapter = "02" if "02" in chapters else chapters[0]
        few = "-x -k 'checkpoint or flag or ranks_marker or published'"
        for command in (["run", "ARGS=--steps 5"], ["test", f"ARGS={few}"]):
            words = ["make", *command, f"CHAPTER={chapter}", f"PY={sys.executable}"]
            run = whole(
                "-c",
                "import os, sys; os.execvp('make', sys.argv[1:])",
                *words,
                cwd=folder / "clone",
            )
            yield succeeds(f"make {command[0]} CHAPTER={chapter} in {ODD!r}", run)


def odd_files(chapter: str, folder: Path) -> Row:
    """--data, --checkpoint and --save with an odd name; what was written is read again."""
    data, kept = (folder / f"{name} {chapter} {ODD}" for name in ("data", "kept"))
    flags = [writer(chapter), *tiny(chapter), "--data", data]
    if chapter == "01":
        a_sound(sound := folder / f"{ODD}.wav")
        line = dict(audio_filepath=sound.name, text="one two")
        data.write_text((json.dumps(line, ensure_ascii=False) + "\n") * 8, "utf-8")
        runs = [whole(*flags, "--save", kept), whole(SPEECH, "--load", kept, "--transcribe", sound)]
    else:
        data.write_text("Größe ist relativ, – 数 ✓. " * 400, "utf-8")
        again = ["--checkpoint", kept] if chapter == "02" else []
        runs = [whole(*flags, *again) for _ in range(1 + len(again) // 2)]
    seen = ", ".join(f"exit code {run.code}{failed(run)}" for run in runs)
    good = all(run.code == 0 and not run.left for run in runs) and (
        kept.exists() or chapter not in ("01", "02")
    )
    seen = seen.replace(str(folder), "…")
    return Row(
        f"chapter {chapter}: files of odd names", "exit code 0, files written and read", seen, good
    )


# ── Another Python, another torch ─────────────────────────────────────────────────────────────────


def environment(chapters: list[str], dice: random.Random) -> Iterator[Row]:
    """What a person does first: each chapter's proof and default run, and the tests that are
    quick."""
    for chapter in chapters:
        yield succeeds(
            f"chapter {chapter} --check --dtype fp64",
            whole(SCRIPTS[chapter], "--check", "--dtype", "fp64"),
        )
        yield succeeds(f"chapter {chapter}", whole(SCRIPTS[chapter]))
    for chapter in chapters:
        tests = sorted((ROOT / "tests").glob(f"test_{chapter}_*.py"))
        run = whole("-m", "pytest", "-m", "not slow", *tests, seconds=900, cwd=ROOT)
        seen = re.sub(r" in \d.*", "", run.out[-1].strip() if run.out else run.last_words())
        if run.code is not None and run.code < 0:
            seen = f"ended by {signal.Signals(-run.code).name}"
        yield Row(f"quick tests of chapter {chapter}", "all pass", seen, run.code == 0)


PARTS = {part.__name__: part for part in (kills, disks, ports, core, names, environment)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PARTS:
        parser.add_argument(
            f"--{name}", action="append_const", const=name, dest="parts", help="only this part"
        )
    parser.add_argument("--chapter", choices=SCRIPTS, help="only this chapter; nothing is written")
    parser.add_argument("--seed", type=int, default=0, help="draws the ranks and moments of kills")
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("asked to stop")
    )  # so that every block ends what it started
    parts, good = args.parts or [name for name in PARTS if name != "environment"], True
    versions = dict(python=platform.python_version(), torch=torch.__version__, cores=os.cpu_count())
    for part in parts:
        rows = []
        key = part + f" of Python {versions['python']}, torch {versions['torch']}" * (
            part == "environment"
        )
        print(f"\n{part}, Python {versions['python']}, torch {versions['torch']}", flush=True)
        for row in PARTS[part](
            [args.chapter] if args.chapter else list(SCRIPTS), random.Random(args.seed)
        ):
            verdict = {True: "ok", False: "FAILED"}.get(row.verdict, row.verdict)
            rows.append(row._replace(verdict=verdict)._asdict())
            print(f"{row.case:60} {verdict}\n     demanded: {row.demanded}")
            print(f"     seen:     {row.seen}", flush=True)
            good = good and row.verdict is not False
            if not args.chapter:
                kept = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
                kept |= {"command": COMMAND, key: dict(**versions, seed=args.seed, cases=rows)}
                KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
    sys.exit(not good)


if __name__ == "__main__":
    main()
