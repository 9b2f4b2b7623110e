"""Checkpoints from somebody else: bombs, false sizes, and files under another name."""

import io
import os
import pickle
import random
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import at_most, spoilt

import mtl
from mtl.safety import archive
from mtl.training import checkpoint

STATE: dict[str, Any] = {"format": checkpoint.FORMAT, "model": {"w": torch.arange(1000.0)}, "config": {"seed": 0}}


def saved(state: Any) -> dict[str, bytes]:
    """Returns the members of the archive that torch makes of the state."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in members.items():
            file.writestr(name, content)


def pickled(path: Path, content: bytes, **more: bytes) -> None:
    """Writes a checkpoint with this pickle."""
    members = saved(STATE) | {"archive/data.pkl": content} | {f"archive/{name}": each for name, each in more.items()}
    zipped(path, members)


def deflated(path: Path) -> None:
    zipped(path, saved({**STATE, "model": {"w": torch.zeros(2**26)}}), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_300_000  # of 256 MB


def overlapping(path: Path) -> None:
    """Writes an archive with two hundred names for the same bytes."""
    zipped(path, saved(STATE) | {"archive/data/1": b"0" * 10_000})
    content = bytearray(path.read_bytes())
    entry = content[(start := content.rindex(b"PK\x01\x02")) :]
    entry = entry[: entry.index(b"PK\x05\x06")]
    end = content.index(b"PK\x05\x06")
    many = b"".join(entry.replace(b"data/1", f"dat{n:03}".encode()) for n in range(200))
    count = struct.unpack_from("<H", content, end + 8)[0] + 200
    directory = struct.unpack_from("<L", content, end + 12)[0] + len(many)
    struct.pack_into("<HHL", content, end + 8, count, count, directory)
    path.write_bytes(content[:end] + many + content[end:])
    assert start < end


def of_one_more(path: Path, numel: int = 2**20, key: str = "0") -> None:
    """Writes a storage that claims more numbers than the file has, which torch would read from beyond the memory."""
    members = saved(STATE)
    claimed = members["archive/data.pkl"].replace(b"M\xe8\x03tq", b"J" + struct.pack("<i", numel) + b"tq", 1)
    assert claimed != members["archive/data.pkl"]
    zipped(
        path,
        members
        | {"archive/data.pkl": claimed.replace(b"\x01\x00\x00\x000q", b"\x01\x00\x00\x00" + key.encode() + b"q")},
    )


def expanded(path: Path) -> None:
    torch.save({**STATE, "model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, path)


def meta(path: Path) -> None:
    torch.save({**STATE, "model": {"w": torch.zeros(3, device="meta")}}, path)


def doubling(path: Path) -> None:
    """Writes a list of a list of a list, …, each twice, which has 2^60 values."""
    value: Any = "x"
    for _ in range(60):
        value = [value, value]
    torch.save({**STATE, "config": value}, path)


def deep(path: Path) -> None:
    pickled(path, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


def deep_config(path: Path) -> None:
    inner = b"]" * 5000 + b"a" * 4999
    pickled(
        path,
        b"\x80\x02}(X\x06\x00\x00\x00formatK" + bytes([checkpoint.FORMAT]) + b"X\x06\x00\x00\x00config" + inner + b"u.",
    )


def itself(path: Path) -> None:
    value: list[Any] = []
    value.append(value)
    torch.save({**STATE, "config": value}, path)


def calling(what: str, argument: bytes) -> Callable[[Path], None]:
    module, name = what.rsplit(".", 1)
    content = b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."
    make = lambda path: pickled(path, content)  # noqa: E731
    make.__name__ = what
    return make


def bytearray8(path: Path) -> None:
    """Writes a pickle with an instruction that allocates as much memory as it claims."""
    pickled(path, b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".")


def long_memo(path: Path) -> None:
    pickled(path, b"\x80\x02Nr\xff\xff\xff\x7f.")


def code(path: Path) -> None:
    pickled(path, pickle.dumps(Bomb(), protocol=2))


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("canary"),)


def many_instructions(path: Path) -> None:
    pickled(path, b"\x80\x02" + b"}" * 300_000_000 + b".")


def nothing_in_it(path: Path) -> None:
    zipped(path, {})


def no_pickle(path: Path) -> None:
    zipped(path, {"archive/version": b"3"})


def twice(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as file:
        for name, content in [*saved(STATE).items(), ("archive/data.pkl", b"\x80\x02}.")]:
            file.writestr(name, content)


def with_a_comment(path: Path) -> None:
    zipped(path, saved(STATE))
    with zipfile.ZipFile(path, "a") as file:
        file.comment = b"x" * 30


def with_another_directory(path: Path) -> None:
    """Writes an empty directory behind the first one; readers of archives may use either."""
    with_a_comment(path)
    path.write_bytes(path.read_bytes()[:-30] + b"x" * 8 + b"PK\x05\x06" + b"\0" * 18)


def larger_than_memory(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**43)


def of_another_size(path: Path) -> None:
    """Writes a storage whose elements claim to have zero bytes."""
    members = saved(STATE)
    kind = b"ctorch\nFloatStorage\n"
    assert kind in members["archive/data.pkl"]
    told = (
        members["archive/data.pkl"]
        .replace(kind, kind + b"}X\x04\x00\x00\x00sizeK\x00sb")
        .replace(b"M\xe8\x03", b"M\xff\xff")
    )
    zipped(path, members | {"archive/data.pkl": told})


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def of_config(path: Path, *parts: bytes) -> None:
    """Writes a state whose config is the result of these instructions."""
    begin = b"\x80\x02}(" + text("format") + b"K" + bytes([checkpoint.FORMAT]) + text("config")
    pickled(path, begin + b"".join(parts) + b"u.")


def called(what: str, *given: bytes) -> bytes:
    return b"c" + "\n".join(what.rsplit(".", 1)).encode() + b"\n(" + b"".join(given) + b"tR"


ENCODE = "_codecs.encode"
# A tuple of a tuple twice, and so on, kept under the number 60: whoever asks for its hash looks at 2^60 values.
TOWER = b"](" + b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b"e"
LIST = b"](" + b"N" * 100_000 + b"eq\x01"


def a_tuple_as_key(path: Path) -> None:
    of_config(path, b"](", TOWER, b"}h\x3cNse")


def a_tuple_in_a_set(path: Path) -> None:
    of_config(path, b"](", TOWER, called("__builtin__.set", b"]h\x3ca"), b"e")


def a_tuple_in_an_ordered_dict(path: Path) -> None:
    of_config(path, b"](", TOWER, called("collections.OrderedDict", b"]h\x3cN\x86a"), b"e")


def keys_of_one_hash(path: Path) -> None:
    keys = (((2**61 - 1) * n).to_bytes(10, "little") for n in range(1, 100_000))
    of_config(path, b"}(", *(b"\x8a\x0a" + key + b"N" for key in keys), b"u")


def encodings(path: Path) -> None:
    """Writes a text that is encoded forty times, each time to twice the length."""
    value = called(ENCODE, text("a"), text("latin1"))
    for _ in range(40):
        value = called(ENCODE, value, text("hex"))
    of_config(path, value)


def a_slow_encoding(path: Path) -> None:
    of_config(path, called(ENCODE, text("".join(chr(n) for n in range(0x4E00, 0x9E00)) * 20), text("punycode")))


def copied(what: str) -> Callable[[Path], None]:
    """Returns a function that writes many calls, each of which makes a copy of the same long list."""
    make = lambda path: of_config(path, b"](", LIST, called(what, b"h\x01") * 30_000, b"e")  # noqa: E731
    make.__name__ = f"copied by {what}"
    return make


def copied_attributes(path: Path) -> None:
    long = b"}(" + b"".join(text(f"k{n}") + b"N" for n in range(10_000)) + b"uq\x01"
    of_config(path, b"](", long, (called("collections.OrderedDict") + b"h\x01b") * 30_000, b"e")


def a_set_of_a_tensor(path: Path) -> None:
    """Writes a set of a tensor in which a single number appears a million million times."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"M\xe8\x03tQ"
    size = b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85"
    tensor = called("torch._utils._rebuild_tensor_v2", storage, b"K\x00", size, b"K\x00\x85\x89N")
    of_config(path, called("__builtin__.set", tensor))


EVIL = b"\x80\x02}" + text("format") + b"K" + bytes([checkpoint.FORMAT]) + b"s" + text("evil") + b"K\x01s."


def before_an_archive(path: Path) -> None:
    """Writes bytes before the archive, which PyTorch takes for its earlier format."""
    zipped(path, saved(STATE))
    old = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}]
    begin = b"".join(pickle.dumps(each, 2) for each in old) + EVIL + pickle.dumps([], 2)
    path.write_bytes(begin + path.read_bytes())


def two_lists_of_parts(path: Path) -> None:
    """Writes an archive whose end points to a second list of members, which Python's reader never uses."""
    both = []
    for content, how in ((EVIL, zipfile.ZIP_DEFLATED), (b"\x80\x02}.", zipfile.ZIP_STORED)):
        zipped(path, {"archive/data.pkl": content, "archive/version": b"3"}, how)
        whole = path.read_bytes()
        count, size, at = struct.unpack("<HII", whole[-12:-2])
        both.append((whole[:at], whole[at : at + size]))
    (theirs, list_1), (ours, list_2) = both
    theirs = theirs.ljust(len(ours))
    shift = len(ours) + len(list_1)  # by which Python takes all places to be moved
    entries, at = bytearray(list_2), 0
    while at < len(entries):
        (place,) = struct.unpack_from("<I", entries, at + 42)
        struct.pack_into("<I", entries, at + 42, len(theirs) + len(list_1) + place - shift)
        at += 46 + sum(struct.unpack_from("<HHH", entries, at + 28))
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, size, len(theirs), 0)
    path.write_bytes(theirs + list_1 + ours + entries + end)


def names_in_capitals(path: Path) -> None:
    """Writes names that differ only in case, which PyTorch takes for the same name."""
    zipped(path, {"archive/DATA.PKL": EVIL} | saved(STATE))


HUGE = b"\x8a\x08" + struct.pack("<q", 2**45)
BOMBS = {
    deflated: "data.pkl is compressed",
    overlapping: "the members of the archive take more bytes than the file has",
    of_one_more: "a tensor's storage takes 4,194,304 bytes, but the archive has 4,000 of it",
    of_another_size: "a tensor's storage takes 262,140 bytes, but the archive has 4,000 of it",
    expanded: "has tensors with far more elements than the file has bytes",
    meta: "its pickle names torch._utils._rebuild_meta_tensor_no_storage",
    doubling: "values",
    deep: "has format None",
    deep_config: "is nested more than 100 levels deep",
    itself: "is nested more than 100 levels deep",
    calling("builtins.bytearray", HUGE): "its pickle names builtins.bytearray",
    calling("torch.Tensor", HUGE): "its pickle names torch.Tensor",
    calling("torch.FloatTensor", HUGE): "its pickle names torch.FloatTensor",
    calling("os.system", b"X\x0c\x00\x00\x00touch canary"): "its pickle names os.system",
    bytearray8: "there is no member or pickle instruction 150",
    long_memo: "has format None",
    code: "its pickle names",
    nothing_in_it: "the archive is empty",
    with_another_directory: "the archive is empty",
    no_pickle: "there is no member or pickle instruction archive/data.pkl",
    twice: "the archive contains archive/data.pkl twice",
    with_a_comment: "the members of the archive take more bytes than the file has",
    a_tuple_as_key: "a dict has a key of type tuple",
    a_tuple_in_a_set: "a dict has a key of type tuple",
    a_tuple_in_an_ordered_dict: "a dict has a key of type tuple",
    keys_of_one_hash: "a dict has a key of type int",
    encodings: "its pickle names another encoding than latin1",
    a_slow_encoding: "its pickle names another encoding than latin1",
    copied("__builtin__.set"): "the copies in its pickle take more bytes than the pickle",
    copied("torch.Size"): "the copies in its pickle take more bytes than the pickle",
    copied_attributes: "the copies in its pickle take more bytes than the pickle",
    a_set_of_a_tensor: "its pickle creates a builtins.set from something else than a list",
    before_an_archive: "the file contains more than an archive",
    two_lists_of_parts: "the file contains more than an archive",
    names_in_capitals: "the names of the archive's members are ambiguous",
    larger_than_memory: "has 8,796,093,022,208 bytes, which is more than this machine's memory",
}


@pytest.fixture
def little_memory() -> Any:
    """Limits the memory to 3 GB more than what is in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much memory is taken isn't known here")
@pytest.mark.parametrize("make", [pytest.param(make, id=make.__name__) for make in BOMBS])
def test_bombs(here: Path, little_memory: None, make: Callable[[Path], None]) -> None:
    path = here / "checkpoints/last.pt"
    path.parent.mkdir()
    make(path)
    with at_most(), pytest.raises(mtl.UserError) as raised:
        checkpoint.load(path)
    assert f"the checkpoint {path} " in str(raised.value)
    assert BOMBS[make] in str(raised.value)
    if "holds more than" not in str(raised.value) and "nested" not in BOMBS[make] and "far more" not in BOMBS[make]:
        with at_most(), pytest.raises(mtl.UserError):
            archive.check_newest(path.parent)  # without torch
    assert not Path("canary").exists()


def test_a_storage_that_is_not_there_or_of_another_folder(here: Path) -> None:
    for key in ("9", "/"):
        of_one_more(here / "last.pt", 1000, key)
        with pytest.raises(mtl.UserError, match=rf"there is no member or pickle instruction archive/data/{key}"):
            checkpoint.load(here / "last.pt")
    of_one_more(here / "last.pt", -1)
    with pytest.raises(mtl.UserError, match="a tensor's storage takes -4 bytes"):
        checkpoint.load(here / "last.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_states_are_made_of_is_read(here: Path) -> None:
    """All kinds of values and tensors that a state may hold, tied and empty ones too."""
    from test_resume import assert_same

    tied = torch.randn(3, 4)
    numbers = {str(kind): torch.ones(2, 3).to(kind) for kind in (torch.float16, torch.bfloat16, torch.int8, torch.bool)}
    numbers |= {str(kind): torch.ones(2).to(kind) for kind in (torch.uint16, torch.complex64, torch.float8_e5m2)}
    state = {
        "numbers": numbers,
        "views": [tied, tied.T, tied[1:], torch.zeros(0), torch.tensor(3.0), torch.ones(1).expand(5)],
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [None, True, -1, 2**40, 2**70, 0.5, float("nan"), "é\ud800", b"bytes", (1, (2,)), {1: {}}, {"x"}, 1j],
        "kinds": [torch.float32, torch.Size([2, 3]), torch.device("cpu")],
        "module": torch.nn.BatchNorm1d(2).state_dict(),
        "long": [{"name": f"n{n}", "values": [n, n + 1]} for n in range(2000)],
    }
    checkpoint.save(here / "last.pt", state)
    loaded = checkpoint.load(here / "last.pt")
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
    for key in ("numbers", "views", "parameter", "kinds", "module", "long"):
        assert_same(loaded[key], state[key], key)
    assert repr(loaded["plain"]) == repr(state["plain"])


@pytest.fixture
def two(here: Path) -> Path:
    """Provides a folder with a best and two last checkpoints."""
    folder = here / "checkpoints"
    checkpoint.save(folder / "best.pt", {"number": 0})
    for number in (1, 2):
        checkpoint.save(folder / "last.pt", {"number": number}, keep=2)
    return folder


@pytest.mark.parametrize("manifest", ["whole", "gone", "of another format"])
def test_files_that_were_exchanged(two: Path, manifest: str) -> None:
    if manifest == "gone":
        (two / "manifest.json").unlink()
    elif manifest == "of another format":
        (two / "manifest.json").write_text('{"sha256": []}')
    assert [checkpoint.load(two / f"{name}.pt")["number"] for name in ("best", "last", "last-1")] == [0, 2, 1]
    (two / "best.pt").rename(two / "kept.pt")
    (two / "last.pt").rename(two / "best.pt")
    (two / "kept.pt").rename(two / "last.pt")
    for path, saved_as in (("best", "last"), ("last", "best")):
        with pytest.raises(mtl.UserError) as raised:
            checkpoint.load(two / f"{path}.pt")
        wanted = f"the checkpoint {two / path}.pt was saved as {saved_as}.pt: files were exchanged, or one was renamed"
        assert wanted in str(raised.value)
    told: list[str] = []
    assert checkpoint.newest(two, told.append)["number"] == 1  # the one before steps in
    assert "was saved as best.pt" in told[0]


def test_a_file_that_was_renamed_or_copied_by_hand(two: Path, here: Path) -> None:
    shutil.copy(two / "best.pt", two / "epoch5.pt")
    shutil.copy(two / "best.pt", here / "model.pt")
    shutil.copy(two / "last-1.pt", two / "last-7.pt")
    (here / "other").mkdir()
    shutil.copy(two / "best.pt", here / "other/best.pt")
    for path in (two / "epoch5.pt", here / "model.pt"):
        with pytest.raises(
            mtl.UserError, match=rf"{path.name} was saved as best\.pt: .*; give it that name, in another"
        ):
            checkpoint.load(path)
    assert checkpoint.load(here / "other/best.pt")["number"] == 0
    assert checkpoint.load(two / "last-7.pt")["number"] == 1  # older ones have names of that kind


def test_files_of_before_names_were_saved_are_read(here: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "number": 1}, here / "best.pt")
    assert checkpoint.load(here / "best.pt")["number"] == 1
    (here / "best.pt").rename(here / "any.pt")
    assert checkpoint.load(here / "any.pt")["number"] == 1


@pytest.mark.parametrize("known", [True, False], ids=["with its manifest", "alone"])
def test_bytes_that_were_changed(here: Path, known: bool) -> None:
    """Anywhere in the file, its pickle included: it is what was saved, or a sentence says that it can't be read."""
    from test_resume import assert_same

    checkpoint.save(here / "last.pt", {**STATE, "best": [1, 2.5, None], "texts": {"a": "x" * 50}})
    whole = (here / "last.pt").read_bytes()
    state = checkpoint.load(here / "last.pt")
    with zipfile.ZipFile(here / "last.pt") as file:
        members = {name: file.read(name) for name in file.namelist()}
    (pickle_of,) = [name for name in members if name.endswith("data.pkl")]
    if not known:
        (here / "manifest.json").unlink()
    refused = 0
    for number in range(10 * int(os.environ.get("MTL_FUZZ", "20"))):
        draws = random.Random(number)
        if number % 2:  # as somebody does it who makes the archive's own checksums fit
            zipped(here / "last.pt", members | {pickle_of: spoilt(members[pickle_of], draws)})
        else:
            (here / "last.pt").write_bytes(spoilt(whole, draws))
        same = (here / "last.pt").read_bytes() == whole
        with at_most():
            try:
                loaded = checkpoint.load(here / "last.pt")
            except mtl.UserError:
                refused += 1
                continue
        assert same or not known, number
        assert isinstance(loaded, dict)
        if not number % 2:  # where the archive's checksums fit nothing but what was saved
            assert_same(loaded, state, "state")
    assert refused > 7 * int(os.environ.get("MTL_FUZZ", "20"))


def test_indices_of_sparse_tensors_are_looked_over(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.9 and some later ones do it only where it is asked for; others would read and write beyond the memory."""
    torch.save({**STATE, archive.SAVED_AS: "last"}, here / "last.pt")
    asked, load = [], torch.load

    def watched(*given: Any, **options: Any) -> Any:
        asked.append(torch.sparse.check_sparse_tensor_invariants.is_enabled())
        return load(*given, **options)

    monkeypatch.setattr("torch.load", watched)
    checkpoint.load(here / "last.pt")
    assert asked == [True]
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()


@pytest.mark.parametrize("change", ["strides", "offset"])
def test_a_tensor_that_reaches_beyond_its_storage_is_known_without_torch(here: Path, change: str) -> None:
    """So that resume=auto passes such a run over."""
    checkpoint.save(here / "last.pt", {**STATE, "numbers": torch.arange(6.0).view(2, 3)})
    archive.check_newest(here)
    with zipfile.ZipFile(here / "last.pt") as file:
        members = {name: file.read(name) for name in file.namelist()}
    (pickle_of,) = [name for name in members if name.endswith("data.pkl")]
    right = b"K\x00K\x02K\x03\x86q"  # offset, shape
    assert members[pickle_of].count(right) == 1
    if change == "offset":
        members[pickle_of] = members[pickle_of].replace(right, b"K\x07" + right[2:])
    else:
        place = members[pickle_of].index(right) + len(right) + 1
        assert members[pickle_of][place : place + 4] == b"K\x03K\x01"
        members[pickle_of] = members[pickle_of][:place] + b"K\x09" + members[pickle_of][place + 2 :]
    zipped(here / "last.pt", members)
    (here / "manifest.json").unlink()
    with pytest.raises(mtl.UserError, match="reaches beyond its storage"):
        archive.check_newest(here)
