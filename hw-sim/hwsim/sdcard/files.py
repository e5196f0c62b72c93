"""Power cuts without root: the system calls of a program, recorded by strace, and what ext4 may make of them.

No file system runs here, so a rule stands in for ext4 (data=ordered, delayed allocation):

- Changes of names and sizes happen in one order, as its journal has them. A cut leaves a first part of them.
- fsync or fdatasync of a file (fsync of a directory) makes that file's data durable. If the file's own name or size
  (the directory's entries) had changed since, the journal is committed, and with it all changes of names and sizes so
  far. If not, only the data.
- Data that no such call confirmed may be there or not, block by block; a file that grew has the size that its blocks on
  the card give it, with zeros where one is missing.

The rule is what a file system may do, and stricter than what ext4 mostly does (it does not count on the periodic
commit, nor on the care that ext4 takes of renames). Alignment in the file is taken for alignment on the device, and a
flash page never holds two files: what those change is for the block recording (`card`) to show.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from hwsim.sdcard.cuts import Cut, Mode, Write, land
from hwsim.sdcard.recording import Told

_MAGIC: Final = b"payterm file recording 1\n"
_CALLS: Final = (
    "openat,open,creat,write,pwrite64,fsync,fdatasync,ftruncate,truncate,lseek,rename,renameat,renameat2,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,mmap,writev,pwritev,pwritev2,fallocate,copy_file_range,sendfile,"
    "link,linkat,symlink,symlinkat"
)
_UNKNOWN: Final = frozenset({
    *("writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "truncate"),
    *("link", "linkat", "symlink", "symlinkat"),
})  # fmt: skip
_DATA_BYTES_MAX: Final = 1 << 26  # of one system call, as strace is to print it
_LINE: Final = re.compile(r"(\d+) +(?:<\.\.\. \w+ resumed>)?(.*)")
_CALL: Final = re.compile(r"(\w+)\((.*)\) += (-?\d+)(?:<.*>)?(?: .*)?$")
_UNFINISHED: Final = " <unfinished ...>"
_DESCRIPTOR: Final = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>(\(deleted\))?")
_TEXT: Final = re.compile(r'"([^"]*)"(\.\.\.)?')
_HEX: Final = re.compile(rb"\\x([0-9a-f]{2})")


class Named(NamedTuple):
    """A change of names: `old` of None makes something there, `new` of None removes it."""

    old: str | None
    new: str | None
    file: int  # 0 for a directory


class Cropped(NamedTuple):
    """A file was given a size."""

    file: int
    size_bytes: int


class Synced(NamedTuple):
    """fsync or fdatasync returned, for a file, or (0) for the directory with this name."""

    file: int
    directory: str


Event: TypeAlias = Write | Named | Cropped | Synced | Told


class Unfit(Exception):
    """The program writes in a way that its system calls do not show, or that this recorder does not read."""


@dataclass(slots=True)
class _Disk:
    """Contents and names at some point, and what of them is durable."""

    contents: dict[int, bytearray] = field(default_factory=dict)
    pending: list[Write | Cropped] = field(default_factory=list)  # data and crops since the file was last synced
    after: list[int] = field(default_factory=list)  # for each: how many changes had come before it
    changes: list[Named | Cropped] = field(default_factory=list)
    durable_changes: int = 0
    dirty: set[int | str] = field(default_factory=set)  # files and directories with changes that are not committed
    sizes: dict[int, int] = field(default_factory=dict)

    def do(self, event: Event) -> None:
        match event:
            case Write(offset, data, file):
                self._pend(event)
                if offset + len(data) > self.sizes.get(file, 0):
                    self.sizes[file] = offset + len(data)
                    self.dirty.add(file)
            case Cropped(file, size_bytes):
                if self.sizes.get(file, 0) != size_bytes:
                    self.changes.append(event)
                    self._pend(event)
                    self.sizes[file] = size_bytes
                    self.dirty.add(file)
            case Named(old, new, file):
                self.changes.append(event)
                self.dirty.update(str(Path(name).parent) for name in (old, new) if name is not None)
                if file:
                    self.dirty.add(file)
            case Synced(file, directory):
                if (file or directory) in self.dirty:
                    self.durable_changes = len(self.changes)
                    self.dirty.clear()
                if file:
                    self._settle(file)
            case Told():
                pass

    def _pend(self, event: Write | Cropped) -> None:
        self.pending.append(event)
        self.after.append(len(self.changes))

    def _settle(self, file: int) -> None:
        kept: list[tuple[Write | Cropped, int]] = []
        for event, after in zip(self.pending, self.after, strict=True):
            if event.file == file:
                _apply(self.contents, event)
            else:
                kept.append((event, after))
        self.pending, self.after = [event for event, _ in kept], [after for _, after in kept]


@dataclass(slots=True)
class FileRecording:
    """One run of a program on the files of one directory."""

    base: dict[str, bytes]
    """Names (relative) and contents before it."""
    events: list[Event]
    told_before: bytes = b""
    _disk: _Disk | None = field(default=None, repr=False)
    _point: int = field(default=0, repr=False)

    def last_point(self) -> int:
        return len(self.events)

    def spoken(self) -> Sequence[int]:
        return [number for number, event in enumerate(self.events, 1) if isinstance(event, Told)]

    def busy(self) -> Sequence[int]:
        disk, points = self._fresh(), []
        for number, event in enumerate(self.events, 1):
            disk.do(event)
            if disk.pending or disk.durable_changes < len(disk.changes):
                points.append(number)
        return points

    def told(self, point: int) -> bytes:
        return self.told_before + b"".join(event.text for event in self.events[:point] if isinstance(event, Told))

    def files(self, cut: Cut) -> dict[str, bytes | None]:
        """Names and contents after `cut`; None for a directory. Cheap when points do not decrease."""
        if self._disk is None or cut.point < self._point:
            self._disk, self._point = self._fresh(), 0
        disk = self._disk
        for event in self.events[self._point : cut.point]:
            disk.do(event)
        self._point = cut.point

        first, last = disk.durable_changes, len(disk.changes)
        survive = {Mode.NONE: first, Mode.ALL: last}.get(cut.mode)
        if survive is None:
            survive = first + hash_of(cut) % (last - first + 1)
        contents = {file: bytearray(content) for file, content in disk.contents.items()}
        # Each pending write goes by its place in the list, so that what lands can be put in order with the crops.
        crops = [event if isinstance(event, Cropped) else None for event in disk.pending]
        gone = {event.file for event, after in zip(crops, disk.after, strict=True) if event and after > survive}
        writes = [
            Write(event.offset, event.data, place)
            for place, event in enumerate(disk.pending)
            if isinstance(event, Write) and not (event.file in gone and disk.after[place] > survive)
        ]
        landing = land(cut, writes)
        by_place: dict[int, list[Write]] = {}
        for piece in landing.written:
            by_place.setdefault(piece.file, []).append(piece)
        for place, event in enumerate(disk.pending):
            if isinstance(event, Cropped):
                if disk.after[place] <= survive:
                    _apply(contents, event)
            else:
                for piece in by_place.get(place, ()):
                    _apply(contents, piece._replace(file=event.file))
        for wreck in landing.destroyed:
            event = disk.pending[wreck.file]
            end = len(contents.setdefault(event.file, bytearray()))
            _apply(contents, Write(wreck.offset, wreck.data[: max(0, end - wreck.offset)], event.file))

        names: dict[str, int] = {}
        for change in disk.changes[:survive]:
            if isinstance(change, Named):
                _rename(names, change)
        return {name: bytes(contents.get(file, b"")) if file else None for name, file in sorted(names.items())}

    def _fresh(self) -> _Disk:
        disk = _Disk()
        for number, (name, content) in enumerate(self.base.items(), 1):
            disk.contents[-number], disk.sizes[-number] = bytearray(content), len(content)
            disk.changes.append(Named(None, name, -number))
        for parent in {str(parent) for name in self.base for parent in Path(name).parents if str(parent) != "."}:
            disk.changes.append(Named(None, parent, 0))
        disk.durable_changes = len(disk.changes)
        return disk

    def save(self, path: Path) -> None:
        path.write_bytes(_MAGIC + pickle.dumps((self.base, self.events, self.told_before)))

    @classmethod
    def load(cls, path: Path) -> FileRecording:
        content = path.read_bytes()
        if not content.startswith(_MAGIC):
            raise ValueError(f"{path} is no recording of files")
        return cls(*pickle.loads(content[len(_MAGIC) :]))  # noqa: S301 (one's own file, like a core dump)

    @staticmethod
    def is_one(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC


def hash_of(cut: Cut) -> int:
    """A number that differs from what `land` draws."""
    return (cut.seed * 2654435761) >> 7


def lay(files: dict[str, bytes | None], directory: Path) -> None:
    """Write them out."""
    for name, content in files.items():
        path = directory / name
        if content is None:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o600)


def record(
    command: Sequence[str], *, directory: Path, control: Path, log: Path, environment: dict[str, str]
) -> tuple[FileRecording, int]:
    """Run `command`, which writes below `directory` and tells on `control`, under strace; and its exit code."""
    base = {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }
    control.touch()
    words = ("strace", "-f", "-qq", "-y", "-xx", "-s", str(_DATA_BYTES_MAX), "-e", "signal=none")
    done = subprocess.run(
        [*words, "-e", f"trace={_CALLS}", "-o", str(log), "--", *command],
        env=environment,
        check=False,
    )
    names = {name: -number for number, name in enumerate(base, 1)}
    sizes = {-number: len(content) for number, content in enumerate(base.values(), 1)}
    events = list(_Reader(directory.resolve(), control.resolve(), names, sizes).events(log))
    return FileRecording(base, events), done.returncode


class _Reader:
    """Reads what strace wrote. Files are known by a number that they keep when they are renamed."""

    def __init__(self, directory: Path, control: Path, names: dict[str, int], sizes: dict[int, int]) -> None:
        self._directory = f"{directory}"
        self._control = f"{control}"
        self._here = f"{Path.cwd()}"
        self._names = names
        self._next = 1
        self._offsets: dict[tuple[str, str], int] = {}
        self._sizes = sizes
        self._appending: set[tuple[str, str]] = set()

    def events(self, log: Path) -> Iterator[Event]:
        begun: dict[str, str] = {}
        with log.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                matched = _LINE.match(line.rstrip("\n"))
                if matched is None:
                    continue
                process, text = matched.groups()
                if text.endswith(_UNFINISHED):
                    begun[process] = text.removesuffix(_UNFINISHED)
                    continue
                call = _CALL.match(begun.pop(process, "") + text)
                if call is not None and int(call[3]) >= 0:
                    yield from self._event(process, call[1], call[2], int(call[3]))

    def _event(self, process: str, call: str, arguments: str, result: int) -> Iterator[Event]:
        if call in {"open", "openat", "creat"}:
            yield from self._opened(process, call, arguments, result)
            return
        if call in {"rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"}:
            yield from self._renamed(call, arguments)
            return
        place = _DESCRIPTOR.search(arguments) if call == "mmap" else _DESCRIPTOR.match(arguments)
        if place is None or place[2]:
            return  # memory of its own, or a file without a name, which no cut brings back
        path = _unhexed(place[1])
        number = (process, arguments.partition("<")[0])
        if path == self._control and call == "write":
            yield Told(_data(arguments))
            return
        name = self._relative(path)
        if name is None:
            return
        if call in _UNKNOWN or (call == "mmap" and "MAP_SHARED" in arguments and "PROT_WRITE" in arguments):
            raise Unfit(f"{call} on {name}: this recorder does not see such writes")
        yield from self._changed(call, arguments, result, name, number)

    def _changed(self, call: str, arguments: str, result: int, name: str, number: tuple[str, str]) -> Iterator[Event]:
        """A call on a descriptor, `number` of process and descriptor, that is open on `name`."""
        file = self._names.get(name, 0)
        match call:
            case "pwrite64":
                yield self._written(file, int(arguments.rpartition(", ")[2]), _data(arguments))
            case "write":
                at = self._sizes.get(file, 0) if number in self._appending else self._offsets.get(number, 0)
                data = _data(arguments)
                self._offsets[number] = at + len(data)
                yield self._written(file, at, data)
            case "lseek":
                self._offsets[number] = result
            case "ftruncate":
                self._sizes[file] = int(arguments.rpartition(", ")[2])
                yield Cropped(file, self._sizes[file])
            case "fallocate":
                _, mode, offset, length = arguments.split(", ")
                if mode != "0":
                    raise Unfit(f"fallocate {mode} on {name}: this recorder knows only the plain one")
                if int(offset) + int(length) > self._sizes.get(file, 0):
                    self._sizes[file] = int(offset) + int(length)
                    yield Cropped(file, self._sizes[file])
            case "fsync" | "fdatasync":
                yield Synced(file, name)
            case _:
                pass

    def _written(self, file: int, offset: int, data: bytes) -> Write:
        self._sizes[file] = max(self._sizes.get(file, 0), offset + len(data))
        return Write(offset, data, file)

    def _opened(self, process: str, call: str, arguments: str, descriptor: int) -> Iterator[Event]:
        name = self._relative(self._path(arguments, 0))
        if name is None or "O_DIRECTORY" in arguments:
            return
        number = (process, str(descriptor))
        self._offsets[number] = 0
        self._appending.discard(number)
        if "O_APPEND" in arguments:
            self._appending.add(number)
        if name not in self._names:
            if "O_CREAT" in arguments or call == "creat":
                self._names[name] = self._next
                self._next += 1
                yield Named(None, name, self._names[name])
        elif "O_TRUNC" in arguments or call == "creat":
            self._sizes[self._names[name]] = 0
            yield Cropped(self._names[name], 0)

    def _renamed(self, call: str, arguments: str) -> Iterator[Event]:
        old = self._relative(self._path(arguments, 0))
        if call.startswith("rename"):
            new = self._relative(self._path(arguments, 1))
            if old is None and new is None:
                return
            if old is None or new is None:
                raise Unfit("a file was moved into or out of the recorded directory")
            change = Named(old, new, self._names.get(old, 0))
        elif old is None:
            return
        elif call.startswith("mkdir"):
            change = Named(None, old, 0)
        else:
            change = Named(old, None, self._names.get(old, 0))
        _rename(self._names, change)
        yield change

    def _path(self, arguments: str, number: int) -> str:
        """Path number `number` among the arguments; a relative one starts from its descriptor."""
        texts = list(_TEXT.finditer(arguments))
        places = _DESCRIPTOR.findall(arguments)
        base = _unhexed(places[min(number, len(places) - 1)][0]) if places else self._here
        return os.path.normpath(os.path.join(base, _unhexed(texts[number][1])))  # noqa: PTH118 (text, no file is asked)

    def _relative(self, path: str) -> str | None:
        if path == self._directory:
            return "."
        return path.removeprefix(self._directory + "/") if path.startswith(self._directory + "/") else None


def _data(arguments: str) -> bytes:
    matched = _TEXT.search(arguments)
    if matched is None or matched[2]:
        raise Unfit("a write was too long to be recorded whole")
    return bytes.fromhex(matched[1].replace("\\x", ""))


def _unhexed(text: str) -> str:
    return os.fsdecode(_HEX.sub(lambda matched: bytes.fromhex(matched[1].decode()), text.encode()))


def _apply(contents: dict[int, bytearray], event: Write | Cropped) -> None:
    content = contents.setdefault(event.file, bytearray())
    if isinstance(event, Cropped):
        del content[event.size_bytes :]
        content.extend(bytes(event.size_bytes - len(content)))
    elif event.data:
        content.extend(bytes(max(0, event.offset - len(content))))
        content[event.offset : event.offset + len(event.data)] = event.data


def _rename(names: dict[str, int], change: Named) -> None:
    if change.old is None:
        names[change.new or ""] = change.file
        return
    below = f"{change.old}/"
    moved = {name: names.pop(name) for name in list(names) if name == change.old or name.startswith(below)}
    if change.new is not None:
        for name, file in moved.items():
            names[change.new + name.removeprefix(change.old)] = file
