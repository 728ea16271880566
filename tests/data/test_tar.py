import tarfile
import zlib

import numpy as np
import pytest

from mmdit.data.images import MAX_BYTES, BadImage
from mmdit.data.tar import Span, read_members, state_of
from mmdit.errors import UserError

from .conftest import add, tar_of

MEMBERS = [(f"{i}.txt", bytes([i]) * (300 * i)) for i in range(8)]


@pytest.mark.parametrize("kind", ["USTAR", "GNU", "PAX"])
def test_members_are_found_with_names_and_contents(tmp_path, kind):
    path = tmp_path / "0.tar"
    long = "k" * 90 + "/" + "n" * 90 + ".txt"
    members = [*MEMBERS, (long, b"long")]
    with tarfile.open(path, "w", format=getattr(tarfile, f"{kind}_FORMAT")) as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        for name, data in members:
            add(tar, name, data)
    found = read_members(path)
    assert [member.name for member in found] == [name for name, _ in members]
    with path.open("rb") as file:
        for member, (_, data) in zip(found, members, strict=True):
            span, read = member.read(file)
            assert read == data == span.read(file)
            assert span.crc32 == zlib.crc32(data)


def test_every_cut_is_noticed(tmp_path):
    path = tar_of(tmp_path / "0.tar", MEMBERS)
    whole = path.read_bytes()
    content = len(whole.rstrip(b"\0"))
    end = -(-content // 512) * 512  # where the end mark begins
    for length in (*range(0, content, 256), end):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"0\.tar must be a complete"):
            read_members(path)
    path.write_bytes(whole[: end + 1024])  # the end mark without what is padded to a record
    assert len(read_members(path)) == len(MEMBERS)


def test_a_damaged_header_does_not_hide_what_follows(tmp_path):
    path = tar_of(tmp_path / "0.tar", MEMBERS)
    whole = bytearray(path.read_bytes())
    whole[read_members(path)[4].offset - 512] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"no entry starts at byte \d+"):
        read_members(path)


def test_random_damage_of_headers_is_noticed_or_read_but_no_other_error(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in MEMBERS[:4]:
            add(tar, f"{name}\u00e9", data)  # with an extended header each
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = whole.copy()
        block = 512 * rng.integers(len(whole) // 512)
        damaged[block + rng.integers(0, 512, 3)] = rng.integers(0, 256, 3)
        header = damaged[block : block + 512]  # with a right sum, so that it is believed
        header[148:156] = ord(" ")
        header[148:156] = np.frombuffer(b"%06o\0 " % int(header.sum(dtype=np.int64)), np.uint8)
        path.write_bytes(damaged.tobytes())
        try:
            with path.open("rb") as file:
                for member in read_members(path):
                    member.read(file)
        except (UserError, BadImage) as error:
            assert str(error)


def sized(kind: bytes, size: int, *, pax: bool = False) -> bytes:
    """A header, with a right sum, of an entry that states any size."""
    entry = tarfile.TarInfo("a.png")
    entry.type = kind
    if pax:
        entry.pax_headers = {"size": str(size)}
        return entry.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = bytes([0xFF if size < 0 else 0x80]) + (size % 2**88).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", [-1, -512, -1024, -(10**6), -(2**63), 10**6, 2**40, 2**62, 2**80])
@pytest.mark.parametrize("pax", [False, True])
@pytest.mark.parametrize("before", [0, 1024])
def test_a_header_that_states_an_impossible_size_is_named_with_its_file(
    tmp_path, size, pax, before
):
    path = tar_of(tmp_path / "0.tar", MEMBERS[:1])
    path.write_bytes(path.read_bytes()[:before] + sized(b"0", size, pax=pax) + bytes(2048))
    if before:
        first = tarfile.TarInfo("first.txt")
        path.write_bytes(first.tobuf() * 2 + path.read_bytes()[before:])
    with pytest.raises(UserError, match=rf"0\.tar must be .* of 'a\.png' states {size} bytes, "):
        read_members(path)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
@pytest.mark.parametrize("size", [-512, 2**21, 2**62])
def test_an_extended_header_of_absurd_size_is_not_read(tmp_path, kind, size):
    path = tmp_path / "0.tar"
    path.write_bytes(sized(kind, size) + bytes(2048))
    with pytest.raises(UserError, match=rf"0\.tar must be .* states {size} bytes, "):
        read_members(path)


def test_extended_headers_without_end_are_refused(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes((sized(b"L", 2) + b"x".ljust(512, b"\0")) * 3000 + bytes(1024))
    with pytest.raises(UserError, match=r"0\.tar is damaged: thousands of consecutive"):
        read_members(path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_file_is_named_as_such(tmp_path, mode):
    with tarfile.open(tmp_path / "0.tar", f"w:{mode}") as tar:
        add(tar, "a.txt", b"a")
    with pytest.raises(UserError, match=r"0\.tar must be .*: it is compressed \((gzip|bzip2|xz)\)"):
        read_members(tmp_path / "0.tar")


def test_a_negative_length_does_not_lead_in_a_circle(tmp_path):
    path = tmp_path / "0.tar"
    entries = [tarfile.TarInfo(name) for name in "abc"]
    entries[2].size = -1024  # so that b follows it
    blocks = [entry.tobuf(tarfile.GNU_FORMAT) for entry in entries]
    path.write_bytes(b"".join(blocks) + bytes(1024))
    with pytest.raises(UserError, match="states -1024 bytes"):
        read_members(path)


def test_two_tar_files_in_one_are_refused(tmp_path):
    path = tar_of(tmp_path / "0.tar", MEMBERS)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="more data follows its end mark"):
        read_members(path)


def test_a_member_with_holes_or_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "0.tar"
    large = tarfile.TarInfo("large.png")
    large.size = MAX_BYTES + 1
    with path.open("wb") as file:
        file.write(large.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + MAX_BYTES + 512 + 1024)  # holes: take no room on the disk
        file.truncate()
    with path.open("rb") as file, pytest.raises(BadImage, match="bytes are more than the limit"):
        read_members(path)[0].read(file)


def test_the_state_follows_the_length_and_the_end(tmp_path):
    path = tar_of(tmp_path / "0.tar", MEMBERS)
    before, whole = state_of(path), path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    assert state_of(path)[0] == before[0] and state_of(path) != before
    path.write_bytes(whole)
    assert state_of(path) == before
    path.write_bytes(b"")
    assert state_of(path) == (0, 0)


def test_a_span_of_other_bytes_is_refused(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        assert Span(3, 4, zlib.crc32(b"tent")).read(file) == b"tent"
        for span in (Span(3, 4, 0), Span(3, 9, zlib.crc32(b"tent"))):
            with pytest.raises(BadImage, match="has changed since it was indexed"):
                span.read(file)
