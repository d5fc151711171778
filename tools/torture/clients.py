"""Hostile clients against the HTTP service, while an honest one asks once in a while.

    python -m tools.torture clients --seconds 10

The service is the real command, in a process of its own. Each attack goes on for ``--seconds``,
while the honest client asks four times a second, each time over a new connection. Promised is that
it is answered every time, that memory stays below the sum of the service's limits, that the log
stays short, and that /health says ok soon after. Then the service is told to end under load,
``--ends`` times: every request over an accepted connection must be answered.
"""

import argparse
import asyncio
import contextlib
import http.client
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distributed.liveness import process_runs
from errors import UserError
from tools.bench.common import ROOT
from tools.bench.serve import children, family, untrained
from tools.common import command
from tools.serve.decoders import SPARE
from tools.serve.service import Limits, decoder_bytes
from tools.torture import hostile
from tools.torture.attacks import AT_RANDOM, ATTACKS, Attack, Target, prepare
from utils import cores

FEW_FILES = 256
MOST_LOG = 200_000  # bytes that an attack may cause, however long it goes on
SLOWEST = 10.0  # seconds of an honest answer: the service's own limit
RECOVERY = 5.0  # seconds until /health says ok again
HEADER = (
    "| attack | honest answers | slowest | peak memory | log | health after |\n"
    "|---|---|---|---|---|---|"
)

BYTES_PER_CONNECTION = 2**19  # what is read ahead of a request, its head, what is written
ENDS = (
    "| answered | refused at the connection | lost or failed | took | exit code |\n"
    "|---|---|---|---|---|"
)


@dataclass
class Service:
    """A running service."""

    port: int
    process: subprocess.Popen[str]
    log: Path

    def tree(self) -> list[int]:
        """The service's process and its children, their children too."""
        return family(self.process.pid)

    def decoders(self) -> list[int]:
        """Those that decode: what its children have forked."""
        return [pid for parent in children(self.process.pid) for pid in children(parent)]

    def memory(self) -> int:
        """Bytes that all its processes hold, shared ones once."""
        return sum(_proportional(pid) for pid in self.tree())


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@contextmanager
def served(checkpoint: Path, folder: Path, files: int | None = None) -> Iterator[Service]:
    """A service of ``checkpoint`` with its defaults, and at most ``files`` open files."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    line = [sys.executable, "-m", "tools.serve", str(checkpoint)]
    line += ["--device", "cpu", "--port", "0", "--threads", "1"]
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".txt", delete=False) as log:
        process = subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=limit
        )
    service: Service | None = None
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise UserError(f"the service did not start: {Path(log.name).read_text()[-500:]}")
        service = Service(int(url.strip("/").rpartition(":")[2]), process, Path(log.name))
        if _seconds_until_well(service.port, 60) is None:
            raise UserError("the service does not answer")
        yield service
    finally:
        left = service.tree()[1:] if service else []
        process.kill()
        process.wait()
        until = time.monotonic() + RECOVERY
        while any(map(process_runs, left)) and time.monotonic() < until:
            time.sleep(0.05)
        if any(map(process_runs, left)):
            raise UserError("processes of the service outlived it")


def _ask(port: int, content: bytes | None, seconds: float) -> int:
    """The status of an answer, of /health without ``content``. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        if content is None:
            connection.request("GET", "/health")
        else:
            connection.request("POST", "/predict", content, {"Content-Type": "image/png"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def _seconds_until_well(port: int, most: float) -> float | None:
    start = time.monotonic()
    while time.monotonic() - start < most:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _ask(port, None, 5) == 200:
                return time.monotonic() - start
        time.sleep(0.1)
    return None


@dataclass
class Result:
    """What came of one attack."""

    name: str
    limit: int  # bytes of memory
    may_lose: bool = False  # single honest answers, with a status that says so
    answers: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    peak: int = 0
    logged: int = 0
    well_after: float | None = None

    def kept(self) -> bool:
        """Whether all that is promised was kept."""
        lost = self.answers.keys() - {"200"}
        return (
            (not lost or (self.may_lose and lost <= {"422", "503", "504"}))
            and self.answers["200"] > 0
            and (self.slowest < SLOWEST or self.may_lose)
            and self.peak < self.limit
            and self.logged < MOST_LOG
            and self.well_after is not None
        )

    def row(self) -> str:
        good, every = self.answers["200"], self.answers.total()
        failed = {what: count for what, count in self.answers.items() if what != "200"}
        after = "stuck" if self.well_after is None else f"ok in {self.well_after:.1f} s"
        return (
            f"| {self.name} | {good} of {every}{f' {failed}' if failed else ''} "
            f"| {self.slowest:.1f} s | {self.peak / 2**20:.0f} MiB | {self.logged:,} B | {after} |"
            + ("" if self.kept() else " **broken**")
        )


def play(
    service: Service, name: str, attack: Attack, seconds: float, seed: int, limit: int
) -> Result:
    """Carry out an attack, ask honestly meanwhile."""
    result = Result(name, limit, attack in AT_RANDOM)
    logged = service.log.stat().st_size
    target = Target("127.0.0.1", service.port, service.decoders, random.Random(seed))
    attacker = multiprocessing.get_context("fork").Process(target=_attack, args=(attack, target))
    attacker.start()
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(service, result, ended))
    watcher.start()
    content, until = hostile.png(300, 200), time.monotonic() + seconds
    while time.monotonic() < until:
        start = time.monotonic()
        try:
            result.answers[str(_ask(service.port, content, 3 * SLOWEST))] += 1
        except (OSError, http.client.HTTPException) as error:
            result.answers[type(error).__name__] += 1
        result.slowest = max(result.slowest, time.monotonic() - start)
        time.sleep(0.25)
    attacker.kill()
    attacker.join()
    result.well_after = _seconds_until_well(service.port, RECOVERY)
    ended.set()
    watcher.join()
    result.logged = service.log.stat().st_size - logged
    return result


def _attack(attack: Attack, target: Target) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(attack(target))  # type: ignore[arg-type]


def _watch(service: Service, result: Result, ended: threading.Event) -> None:
    while not ended.wait(0.2):
        result.peak = max(result.peak, service.memory())


# --- the end --------------------------------------------------------------------------------------


async def _load(port: int, clients: int, tally: Counter[str]) -> None:
    """Clients that ask one after the other, half of them over one connection, until refused."""
    sent = hostile.request(hostile.png(200, 200))
    close = sent.replace(b"Host", b"Connection: close\r\nHost")
    await asyncio.gather(*(_client(port, sent if n % 2 else close, tally) for n in range(clients)))


async def _client(port: int, sent: bytes, tally: Counter[str]) -> None:
    reader = writer = None
    while True:
        if writer is None:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                tally["refused at the connection"] += 1
                return
            except OSError as error:
                tally[f"connecting: {type(error).__name__}"] += 1
                return
        assert reader is not None
        try:
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
            tally["answered" if b" 200 " in head else head[9:12].decode()] += 1
            kept = b"connection: close" not in head
        except (OSError, asyncio.IncompleteReadError) as error:
            tally[f"lost: {type(error).__name__}"] += 1
            kept = False
        if not kept:
            writer.close()
            writer = None


def end_under_load(checkpoint: Path, folder: Path, clients: int, rng: random.Random) -> str:
    """A row: what became of the requests of ``clients`` while the service was told to end."""
    tally: Counter[str] = Counter()

    async def run(service: Service) -> float:
        loading = asyncio.create_task(_load(service.port, clients, tally))
        await asyncio.sleep(1.0 + rng.random())
        service.process.terminate()
        start = time.monotonic()
        await asyncio.wait_for(loading, 60)
        await asyncio.to_thread(service.process.wait, 60)
        return time.monotonic() - start

    with served(checkpoint, folder) as service:
        took = asyncio.run(run(service))
        code = service.process.returncode
    refused = tally["refused at the connection"]
    others = {k: v for k, v in tally.items() if k not in ("answered", "refused at the connection")}
    told = "" if not others and code == 0 else " **broken**"
    return f"| {tally['answered']} | {refused} | {others or 0} | {took:.1f} s | {code} |{told}"


# --- the command ----------------------------------------------------------------------------------


def most_memory(idle: int) -> int:
    """Bytes that a service with default limits may hold, which holds ``idle`` without clients."""
    limits = Limits()
    buffers = limits.connections * BYTES_PER_CONNECTION
    return idle + limits.bodies + buffers + (cores() + SPARE) * decoder_bytes(limits)


def _attacks(arguments: argparse.Namespace, checkpoint: Path, folder: Path) -> list[Result]:
    chosen = {name: attack for name, attack in ATTACKS.items() if arguments.only in name}
    results: list[Result] = []
    prepare()
    for files in (None, FEW_FILES):
        names = chosen if files is None else [name for name in chosen if name.startswith("1,000")]
        if not names:
            continue
        with served(checkpoint, folder, files) as service:
            for _ in range(20):
                _ask(service.port, hostile.png(300, 200), 60)
            idle = service.memory()
            limit = most_memory(idle)
            print(
                f"\nwithout clients {idle / 2**20:.0f} MiB in {len(service.tree())} processes; "
                f"the limit is {limit / 2**20:.0f} MiB"
                + (f"; {files} open files" if files else "")
                + f"\n\n{HEADER}",
                flush=True,
            )
            for name in names:
                results.append(
                    play(service, name, chosen[name], arguments.seconds, arguments.seed, limit)
                )
                print(results[-1].row(), flush=True)
            time.sleep(1.0)
            print(f"\nafter all of them: {service.memory() / 2**20:.0f} MiB", flush=True)
    return results


def get_parser() -> argparse.ArgumentParser:
    parser = command.parser("torture clients", __doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each attack (default: 10)")
    parser.add_argument("--ends", type=int, default=10, help="ends under load (default: 10)")
    parser.add_argument("--clients", type=command.positive, default=32, help="while it ends")
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    parser.add_argument("--seed", type=int, default=0, help="of what is random (default: 0)")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = untrained("deit_nano_patch4_32", 32, folder)
        broken = sum(not result.kept() for result in _attacks(arguments, checkpoint, folder))
        rng = random.Random(arguments.seed)
        if arguments.ends:
            print(f"\n{ENDS}", flush=True)
        for _ in range(arguments.ends):
            row = end_under_load(checkpoint, folder, arguments.clients, rng)
            broken += "broken" in row
            print(row, flush=True)
    print(f"\n{broken} promises broken")
    return int(bool(broken))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(_run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
