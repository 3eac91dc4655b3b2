"""JSON lines that several processes add to."""

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path


def append(path: Path, records: Iterable[dict]) -> None:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(record) + "\n" for record in records))


def read(path: Path) -> list[dict]:
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # no line is half written
        return [json.loads(line) for line in file]
