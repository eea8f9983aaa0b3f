"""Makes the files of a directory with as many processes as there are, one file each at a time."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from diffusers_linattn.files import read_json, write_json
from diffusers_linattn.samples.shards import broken_shards, is_whole, write_shard


# Locks, and files that are not whole yet. Each file has a folder of its own there, which a killed process leaves
# behind and the next one to hold the lock of that file removes.
_WORK = ".work"
_SECONDS_BETWEEN_LOOKS = 0.2

Content = tuple[dict[str, torch.Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One file to make.

    Args:
        name: Of the file.
        count: How many samples, or prompts, are in it.
        make: Makes its tensors and its record; is given a function to call with the number of samples just made.
    """

    name: str
    count: int
    make: Callable[[Callable[[int], Any]], Content]


def complete(directory: Path, jobs: Sequence[Job], description: str, unit: str) -> None:
    """See to it that all files are there and whole, together with any other process that does the same.

    A file that an earlier run left is checked; what is truncated or altered is reported and made again. Returns when
    every file is there, whoever made it.
    """
    process, processes, is_main = _place_among_processes()
    left = [job for job in jobs if (directory / job.name).exists()]
    broken = {path.name for path in broken_shards([directory / job.name for job in left], f"checking {unit}s")}
    waiting = [job for job in jobs if job not in left or job.name in broken]
    # Each process starts at another file, so that they meet seldom.
    first = len(waiting) * process // processes
    waiting = waiting[first:] + waiting[:first]
    done = sum(job.count for job in jobs) - sum(job.count for job in waiting)
    bar = tqdm(total=sum(job.count for job in jobs), initial=done, desc=description, unit=unit, disable=not is_main)
    with bar:
        while waiting:
            remaining = [job for job in waiting if not _done(directory, job, job.name in broken, bar.update)]
            if len(remaining) == len(waiting):
                time.sleep(_SECONDS_BETWEEN_LOOKS)  # other processes are at work on the rest
            waiting = remaining


def _done(directory: Path, job: Job, was_broken: bool, update: Callable[[int], Any]) -> bool:
    """Whether a file is there now, perhaps because this process has just made it."""
    path = directory / job.name

    def found() -> bool:
        # Files that appear while this process runs were moved into place whole.
        return path.exists() and (not was_broken or is_whole(path))

    if not found():
        try:
            with lock(directory, job.name, wait=False):
                if not found():
                    if path.exists():
                        warnings.warn(f"{path} is truncated or altered: it is made again.", stacklevel=2)
                    content = job.make(update)
                    _move_into_place(path, lambda unfinished: write_shard(unfinished, *content))
                    return True
        except Timeout:
            return False
    update(job.count)
    return True


def write_together(directory: Path, name: str, content: Any) -> None:
    """Write a JSON file that every process writes alike."""
    path = directory / name

    def is_there() -> bool:
        return path.exists() and read_json(path) == content

    if not is_there():
        with lock(directory, name, wait=True):
            if not is_there():
                _move_into_place(path, lambda unfinished: write_json(unfinished, content))


@contextmanager
def lock(directory: Path, name: str, wait: bool) -> Iterator[None]:
    """Holds a lock that dies with its process; `Timeout` if another has it and `wait` is false."""
    path = directory / _WORK / f"{name}.lock"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(path).acquire(timeout=-1 if wait else 0)
        except FileNotFoundError:  # a process that was ready has just removed the locks
            continue
        break
    with held:
        yield


def tidy_up(directory: Path) -> None:
    """Remove the locks, when there is nothing left to lock."""
    shutil.rmtree(directory / _WORK, ignore_errors=True)


def _move_into_place(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file, and move it to where it belongs; its lock is held."""
    folder = path.parent / _WORK / path.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write(folder / path.name)
    (folder / path.name).replace(path)
    folder.rmdir()


def _place_among_processes() -> tuple[int, int, bool]:
    """This process's number, how many there are, and whether it shows the bar, as launchers say it."""
    # Not from accelerate's PartialState, which would choose a device for the whole process.
    process, processes = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    return process, processes, process == 0
