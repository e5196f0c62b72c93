"""Backups: what comes back is what went in, whole or not at all, and nothing is overwritten."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import hmac
import os
import stat
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from terminal.ledger import backup
from terminal.ledger.backup import CHUNK_BYTES, Contents, Copy
from terminal.ledger.errors import BackupError, KeyUnavailable, LedgerCorrupt, LedgerError
from terminal.ledger.journal import START, Position
from terminal.ledger.keys import Keyring, SecretKey

OLD, DATA, CHAIN, OTHER = (SecretKey(Random(seed).randbytes(32)) for seed in (1, 2, 3, 4))
KEYS = Keyring(DATA, (OLD,))
HEADER_BYTES = 100
FRAME = struct.Struct(">IB")


def some(count: int, seed: int = 5) -> list[Copy]:
    """Records of about the size of real ones; every third with a payload."""
    chance = Random(seed)
    return [
        (chance.randbytes(chance.randint(172, 700)), chance.randbytes(1800) if number % 3 == 0 else None)
        for number in range(count)
    ]


def end(records: list[Copy]) -> Position:
    return Position(len(records), records[-1][0][-32:]) if records else START


def save(path: Path, records: list[Copy], given: Iterable[Copy] | None = None, **changed: Any) -> Contents:
    arguments: dict[str, Any] = {
        "epoch": 7,
        "position": end(records),
        "data": KEYS,
        "chain": CHAIN,
        "made_at_ms": 1_790_000_000_000,
        "entropy": Random(6).randbytes,
    }
    return backup.write(path, records=records if given is None else given, **(arguments | changed))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "till-1.backup"


def frames(content: bytes) -> list[bytes]:
    """The sealed chunks, each with its frame."""
    found, at = [], HEADER_BYTES
    while at < len(content):
        length, _ = FRAME.unpack_from(content, at)
        found.append(content[at : at + FRAME.size + length])
        at += FRAME.size + length
    return found


def refused(path: Path, content: bytes, data: Keyring = KEYS) -> LedgerError:
    """Neither verified nor read: not one record is given."""
    path.write_bytes(content)
    with pytest.raises((BackupError, KeyUnavailable)) as verified:
        backup.verify(path, data, CHAIN)
    with pytest.raises(type(verified.value)):
        next(backup.read(path, data, CHAIN))
    return verified.value


# --- What comes back ----------------------------------------------------------------------------------------------

COPIES = st.lists(
    st.tuples(st.binary(min_size=32, max_size=4096), st.none() | st.binary(min_size=1, max_size=12288)), max_size=40
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=COPIES, repeat=st.integers(1, 30))
def test_what_went_in_comes_back(tmp_path: Path, records: list[Copy], repeat: int) -> None:
    path, records = tmp_path / "round", records * repeat  # some are longer than a chunk
    path.unlink(missing_ok=True)
    written = save(path, records)
    assert list(backup.read(path, KEYS, CHAIN)) == records
    assert backup.verify(path, KEYS, CHAIN) == written
    assert (written.epoch, written.position, written.records) == (7, end(records), len(records))
    assert written.size_bytes == path.stat().st_size


def test_it_says_loudly_that_no_key_is_inside(path: Path) -> None:
    written = save(path, some(10))
    assert written.keys_needed.startswith("NO KEY IS IN THIS BACKUP")
    assert DATA.id.hex() in written.keys_needed
    assert CHAIN.id.hex() in written.keys_needed
    for key in (OLD, DATA, CHAIN):
        for secret in (key.material, key.material.hex().encode()):
            assert secret not in path.read_bytes()
            assert secret not in (repr(written) + written.keys_needed).encode()


def test_the_file_is_as_documented(path: Path) -> None:
    """Opened once with nothing but docs/formats.md."""
    records = some(500)
    save(path, records)
    content = path.read_bytes()
    header = content[:HEADER_BYTES]
    assert header[:8] == b"PTB1\x01\0\0\0"
    assert header[8:12] == DATA.id
    assert header[12:16] == CHAIN.id
    assert struct.unpack_from(">IQ32sq", header, 16) == (7, *end(records), 1_790_000_000_000)
    base = hmac.digest(DATA.material, b"payterm backup 1", "sha256")
    cipher = AESGCM(hmac.digest(base, header, "sha256"))
    chunks = frames(content)
    assert len(chunks) > 1
    plain = b""
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        assert chunk[4] == last
        nonce = number.to_bytes(8, "big") + bytes(3) + bytes((last,))
        plain += zlib.decompress(cipher.decrypt(nonce, chunk[5:], None))
    assert plain == b"".join(struct.pack(">HH", len(r), len(p or b"")) + r + (p or b"") for r, p in records)


def test_two_backups_of_the_same_records_share_no_key(tmp_path: Path) -> None:
    records, chance = some(20), Random(9)
    for name in ("a", "b"):
        save(tmp_path / name, records, entropy=chance.randbytes)
    a, b = ((tmp_path / name).read_bytes() for name in ("a", "b"))
    assert frames(a)[0] != frames(b)[0]
    refused(tmp_path / "c", a[:HEADER_BYTES] + b[HEADER_BYTES:])


# --- What does not ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("long") / "backup"
    save(path, some(900))
    content = path.read_bytes()
    assert len(frames(content)) >= 4
    return content


def test_cut_short_at_every_chunk(path: Path, long: bytes) -> None:
    at = HEADER_BYTES
    cuts = [0, 1, HEADER_BYTES - 1]
    for frame in frames(long):
        cuts += [at, at + 1, at + FRAME.size, at + FRAME.size + 1, at + len(frame) - 1]
        at += len(frame)
    assert at == len(long)
    for cut in cuts:
        refused(path, long[:cut])


def test_put_together_differently(path: Path, long: bytes) -> None:
    header, chunks = long[:HEADER_BYTES], frames(long)

    def build(*order: int) -> bytes:
        return header + b"".join(chunks[number] for number in order)

    last = len(chunks) - 1
    for order in (
        (1, 0, *range(2, last + 1)),  # exchanged
        (0, 0, *range(1, last + 1)),  # twice
        (0, *range(2, last + 1)),  # one left out
        (last,),  # only the end
        (*range(last + 1), last),  # the end twice
        (*range(last + 1), 0),  # going on after the end
    ):
        refused(path, build(*order))
    # The end taken away and another chunk declared to be it.
    declared = bytearray(build(*range(last)))
    declared[-len(chunks[last - 1]) + 4] = 1
    refused(path, bytes(declared))
    refused(path, long + b"\0")
    path.write_bytes(build(*range(last + 1)))  # the rig itself builds a good one
    assert backup.verify(path, KEYS, CHAIN).records == 900


def test_every_flipped_bit_is_found(path: Path, long: bytes) -> None:
    chance = Random(11)
    bits = [*range(0, HEADER_BYTES * 8, 17), *(chance.randrange(len(long) * 8) for _ in range(200))]
    for bit in bits:
        flipped = bytearray(long)
        flipped[bit // 8] ^= 1 << bit % 8
        error = refused(path, bytes(flipped))
        assert isinstance(error, KeyUnavailable) == (64 <= bit < 128), bit  # the keys' ids are in bytes 8 to 15


def test_other_keys(path: Path) -> None:
    save(path, some(5))
    with pytest.raises(KeyUnavailable, match=f"data key {DATA.id.hex()}") as caught:
        backup.verify(path, Keyring(OTHER), CHAIN)
    assert DATA.material.hex() not in str(caught.value)
    with pytest.raises(KeyUnavailable, match=f"chain key {CHAIN.id.hex()}"):
        backup.verify(path, KEYS, OTHER)
    # A key that has been retired since still opens it.
    assert backup.verify(path, Keyring(OTHER, (DATA,)), CHAIN).records == 5


def test_what_is_no_backup(tmp_path: Path) -> None:
    for name in ("missing", "directory", "fifo", "empty", "text"):
        path = tmp_path / name
        match name:
            case "directory":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case "empty":
                path.touch()
            case "text":
                path.write_text("not a backup at all, and longer than a header is, which takes a hundred bytes" * 2)
        with pytest.raises(BackupError, match=name):
            backup.verify(path, KEYS, CHAIN)


def test_a_newer_form_is_named(path: Path, long: bytes) -> None:
    error = refused(path, long[:4] + b"\x02" + long[5:])
    assert "form 2" in str(error)


# --- All or nothing -----------------------------------------------------------------------------------------------


def left(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def test_nothing_is_overwritten(path: Path) -> None:
    for make in (lambda: path.write_bytes(b"dear"), lambda: path.symlink_to("nowhere"), path.mkdir):
        make()
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(BackupError, match="left as it is"):
            save(path, some(3))
        assert (path.read_bytes() if path.is_file() else None) == before
        assert left(path) == [path.name]
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_what_appears_meanwhile_is_not_overwritten(path: Path) -> None:
    def records() -> Iterator[Copy]:
        yield from some(3)
        path.write_bytes(b"dear")

    with pytest.raises(BackupError, match="left as it is"):
        save(path, some(3), records())
    assert path.read_bytes() == b"dear"
    assert left(path) == [path.name]


def test_another_backup_to_the_same_file(path: Path) -> None:
    def records() -> Iterator[Copy]:
        with pytest.raises(BackupError, match="another backup"):
            save(path, some(3))
        yield from some(3)

    save(path, some(3), records())
    assert left(path) == [path.name]


def test_records_that_break_off_leave_nothing(path: Path) -> None:
    def records() -> Iterator[Copy]:
        yield from some(500)
        raise LedgerCorrupt.at_record(501, "is damaged")

    with pytest.raises(LedgerCorrupt):
        save(path, some(500), records())
    assert left(path) == []


@pytest.mark.parametrize("given", [some(9), some(11), []], ids=["one missing", "one too many", "none"])
def test_records_that_end_elsewhere_are_no_backup(path: Path, given: list[Copy]) -> None:
    with pytest.raises(BackupError, match="do not end where the ledger does"):
        save(path, some(10), given)
    assert left(path) == []


@pytest.mark.parametrize("copy", [(b"short", None), (bytes(4097), None), (bytes(40), b""), (bytes(40), bytes(12289))])
def test_what_is_no_record(path: Path, copy: Copy) -> None:
    with pytest.raises(ValueError, match="bytes"):
        save(path, [copy])
    assert left(path) == []


def test_what_does_not_read_back_is_no_backup(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that takes a write and keeps something else."""
    real = os.fsync

    def spoil(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.pwrite(descriptor, b"\xff\xff", 5000)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(BackupError, match="damaged in chunk 0"):
        save(path, some(100))
    assert left(path) == []


def test_what_was_flushed_is_complete_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def fsync_seen(descriptor: int) -> None:
        status = os.fstat(descriptor)
        order.append("fsync directory" if stat.S_ISDIR(status.st_mode) else f"fsync {status.st_size} bytes")
        fsync(descriptor)

    def rename_seen(*names: str, **directories: int) -> None:
        order.append("rename")
        rename(*names, **directories)

    monkeypatch.setattr(os, "fsync", fsync_seen)
    monkeypatch.setattr(os, "rename", rename_seen)
    written = save(path, some(100))
    assert order == [f"fsync {written.size_bytes} bytes", "rename", "fsync directory"]


def test_a_full_disk_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BackupError, match="No space left"):
        save(path, some(100))
    assert left(path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_really_full_disk(tmp_path: Path) -> None:
    libc, small = ctypes.CDLL(None, use_errno=True), tmp_path / "small"
    small.mkdir()
    if libc.mount(b"none", str(small).encode(), b"tmpfs", 0, b"size=256k"):
        pytest.skip(f"no small disk here: {os.strerror(ctypes.get_errno())}")
    try:
        with pytest.raises(BackupError, match="No space left"):
            save(small / "backup", some(900))
        assert left(small / "backup") == []
        assert save(small / "backup", some(90)).records == 90
    finally:
        libc.umount2(str(small).encode(), 0)


# --- Size ---------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_hundred_thousand_records_pass_through_a_bounded_memory(path: Path) -> None:
    pool = [(record, None) for record, _ in some(100)]
    last = (hashlib.sha256(b"last").digest(), None)

    def records() -> Iterator[Copy]:
        for number in range(99_999):
            yield pool[number % 100]
        yield last

    def read() -> None:
        assert sum(1 for _ in backup.read(path, KEYS, CHAIN)) == 100_000

    bound = 12 * CHUNK_BYTES  # what is pending, its copies as bytes, compressed, sealed and opened, and buffers
    assert peak_bytes(lambda: save(path, [last], records())) < bound
    assert peak_bytes(read) < bound
    assert path.stat().st_size > 12 * bound  # or the bound says nothing
    assert peak_bytes(lambda: [bytearray(record) for record, _ in records()]) > bound  # the measure itself works
