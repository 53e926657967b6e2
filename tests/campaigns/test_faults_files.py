"""Campaigns: damaged and hostile checkpoints are refused in one line, or load as what they were."""

import collections
import io
import math
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import helpers as h
import pytest
import torch
from driver import SCHEDULE, Campaign, undisturbed

import train_graceful as t

LARGE = "--context 16 --layers 4 --heads 2 --dim 128 --experts 2 --batch-size 4".split()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints(mode, *options): one of a finished run."""
    get = undisturbed(tmp_path_factory.mktemp("files"), *SCHEDULE, windows=300, context=16)
    return lambda mode, *options: get(mode, *options)[1] / "final.pt"


def refused(fork, path: Path, data: bytes, may_be_taken=False, original=None) -> None:
    """Resumed: in one line, with little memory and without harm; or taken for the original."""

    def compare(frame) -> None:
        state = frame.f_locals.get("state")
        if original is not None and isinstance(state, dict):
            h.assert_same(state, original)

    path.write_bytes(data)
    # A fork begins with as much (KiB) as this process has.
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4
    plan = [(h.Moment("load", event="return"), compare)]
    child = fork("--resume", path, "--checkpoint-dir", path.parent, plan=plan)
    # PyTorch's own warning, of a tensor that stands where an optimizer's state belongs.
    warning = r".*UserWarning: Using a non-tuple sequence.*\n  .*\r\n\r\n"
    output = re.sub(warning, "", child.finish())
    if child.exitcode or not may_be_taken:
        assert child.exitcode == 2, output[-3000:]
        # Of a slow one, the status line has been erased.
        line = output.rstrip().rpartition("\r")[2]
        assert line.startswith("error: ") and "\n" not in line, output[-3000:]
    assert not (path.parent / "executed").exists()
    # Many records and as many lists take some; no bomb goes off.
    assert child.peak <= before + 300_000, f"{child.peak} KiB"


# ---- damage


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged_versions(data: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of about count damaged versions."""
    size = len(data)
    # Where the zip file's own directory begins: every bit of that carries something.
    directory = data.rindex(b"PK\1\2", 0, data.index(b"PK\1\2") + 4)
    evenly = count // 2
    bits = [int((i + rng.random()) * size * 8 / evenly) for i in range(evenly)]
    bits += [rng.randrange(directory * 8, size * 8) for _ in range(count // 5)]
    for bit in bits:
        yield f"bit {bit} flipped", flipped(data, bit)
    cuts = {0, 3, 21, 22, 30, 100, size - 1, size - 2, size - 22, directory, directory - 1}
    cuts |= {2**k for k in range(size.bit_length())}
    cuts |= {rng.randrange(size) for _ in range(count // 20)}
    for cut in sorted(cuts):
        yield f"cut to {cut}", data[:cut]
    for i in range(count // 20):
        at = rng.randrange(size)
        yield f"byte {at} replaced", data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        length = rng.choice([16, 64, 512, 4096])
        one, two = sorted(rng.randrange(size // length) * length for _ in range(2))
        first, second = data[one : one + length], data[two : two + length]
        swapped = data[:one] + second + data[one + length : two] + first + data[two + length :]
        if one < two:
            yield f"{length} bytes swapped at {one} and {two}", swapped
        length = rng.choice([1, 22, 64, 512, 4096, size // 2, size])
        yield f"last {length} bytes zero ({i})", data[:-length] + bytes(length)
        zeros = data[:at] + bytes(length) + data[at + length :]
        yield f"{length} bytes zero at {at}", zeros[:size]
    for length in (1, 22, 1000, 70_000):
        yield f"{length} random bytes", rng.randbytes(length)
        yield f"{length} random bytes behind", data + rng.randbytes(length)
        yield f"{length} random bytes before", rng.randbytes(length) + data
    yield "twice", data + data
    yield "nothing but zeros", bytes(size)
    yield "another pickle", pickle.dumps({"step": 1})
    yield "another program's torch.save", saved(torch.ones(3))
    yield "an empty zip file", b"PK\5\6" + bytes(18)
    yield "another zip file", zipped(io.BytesIO(data), {"": None}, more=["word/document.xml"])


def test_rotten_bits(fork, checkpoints, tmp_path, whole):
    runs = [(30, "geometric")]
    if whole:
        runs = [(1300, "standard"), (1300, "geometric"), (300, "standard", *LARGE)]
    what = "damaged checkpoints (flipped bits, cuts, swaps, zeros, other files) resumed"
    with Campaign(what) as campaign:
        for count, *run in runs:
            source = checkpoints(*run)
            original = t.load_checkpoint(source)
            versions = damaged_versions(source.read_bytes(), count, random.Random(count))
            for name, data in versions:
                how = tmp_path / "damaged.pt", data, True, original
                campaign.case(f"{run}: {name}", refused, fork, *how)


def structure_bits(path: Path) -> list[int]:
    """All bits of the file that are not in a tensor: headers, padding, pickle, directory."""
    data, tensors = path.read_bytes(), set()
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                start = record.header_offset + 30
                start += sum(struct.unpack("<HH", data[start - 4 : start]))
                tensors |= set(range(start, start + record.file_size))
    return [8 * byte + bit for byte in range(len(data)) if byte not in tensors for bit in range(8)]


def test_bits_of_the_structure(checkpoints, tmp_path, whole):
    """A zip file says some things twice; zipfile and torch may believe different ones."""
    source, path = checkpoints("standard"), tmp_path / "damaged.pt"
    original, data = t.load_checkpoint(source), source.read_bytes()

    def check(bit: int) -> None:
        path.write_bytes(flipped(data, bit))
        try:
            state = t.load_checkpoint(path)
        except t.CheckpointError as error:
            assert "\n" not in str(error)
        else:
            h.assert_same(state, original)

    with Campaign("bits all over a checkpoint outside its tensors flipped, loaded") as campaign:
        for bit in structure_bits(source)[:: 7 if whole else 251]:
            campaign.case(f"bit {bit}", check, bit)


# ---- malice


class Calls:
    """Pickles as a call of any function ("module:name"), which unpickling would make."""

    def __init__(self, function: str, *arguments) -> None:
        self.function, self.arguments = function, arguments


class Pickler(pickle._Pickler):
    """The one in Python, which can be taught to write a GLOBAL of anything."""

    def save(self, value, save_persistent_id=True) -> None:
        if isinstance(value, Calls):
            self.write(pickle.GLOBAL + value.function.replace(":", "\n").encode() + b"\n")
            super().save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def pickled(value: object) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


def saved(state: object) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def zipped(source, change, compression=zipfile.ZIP_STORED, attributes=0, more=()) -> bytes:
    """The file with other records, checksums right: {how its name ends: its content, or None}.

    torch.save's records have no attributes: with some, a file is refused for them.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            name, content = record.filename, old.read(record)
            for end in change:
                content = change[end] if name.endswith(end) else content
            if content is not None:
                new.writestr(name, content)
        for extra in more:
            new.writestr(extra.replace("FOLDER", name.partition("/")[0]), b"x")
        for record in new.infolist():
            record.external_attr = attributes
    return stream.getvalue()


def pickles_that_run_code(marker: Path) -> list[Calls]:
    touch, code, path = f"touch {marker}", f"open({str(marker)!r}, 'w')", str(marker)
    system = Calls("os:system", touch)
    return [
        *(Calls(one, touch) for one in "os:system posix:system subprocess:getoutput".split()),
        *(Calls(f"builtins:{one}", code) for one in ("eval", "exec", "compile")),
        *(Calls(f"torch{one}:load", path) for one in ("", ".serialization", ".jit", ".hub")),
        *(Calls(one, path) for one in "runpy:run_path pathlib:Path.touch shutil:rmtree".split()),
        *(Calls(one, ("touch", path)) for one in "subprocess:Popen pty:spawn".split()),
        *(Calls(one, system) for one in "builtins:map collections:OrderedDict".split()),
        Calls("builtins:open", path, "w"),
        Calls("builtins:getattr", Calls("importlib:import_module", "os"), "system"),
        Calls("torch._utils:_import_dotted_name", "os.system"),
        Calls("operator:methodcaller", "system", touch),
        Calls("numpy.core.multiarray:_reconstruct", 1),
    ]


def objects_of_any_size() -> list[Calls]:
    large, encode = 10**10, "_codecs:encode"
    return [
        *(Calls(f"builtins:{one}", 4 * 10**9) for one in ("bytearray", "bytes", "range")),
        *(Calls(f"torch:{one}", large) for one in ("FloatStorage", "UntypedStorage", "zeros")),
        *(Calls(one, [1]) for one in "builtins:set collections:Counter".split()),
        Calls("torch:Tensor", 2 * 10**8),
        Calls("torch.nn.parameter:Parameter", Calls("torch:Tensor", large)),
        Calls("torch._utils:_rebuild_meta_tensor_no_storage", 1),
        Calls(encode, Calls(encode, b"x" * 1000, "hex"), "hex"),
        Calls("torch:Size", (10**18, 10**18)),
    ]


def replaced(state, keys: tuple, value: object):
    """A copy of nested state in which the item at keys is value."""
    if not keys:
        return value
    changed = list(state) if isinstance(state, (list, tuple)) else dict(state)
    changed[keys[0]] = replaced(state[keys[0]], keys[1:], value)
    return tuple(changed) if isinstance(state, tuple) else changed


# Places in a checkpoint where a value might be looked at.
PLACES = [
    *[("saved_at",), ("config", "data"), ("best", "value"), ("model_state_dict", "head.weight")],
    ("optimizer_state_dicts", "adamw", "state", 0, "exp_avg"),
    ("optimizer_state_dicts", "adamw", "param_groups", 0, "lr"),
    ("scheduler_state_dicts", "adamw", "lr_lambdas", 0),
]


def claims(numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """The pickle of a tensor on record 0 that claims to be this large."""
    number, *rest = (pickle.dumps(part, 2)[2:-1] for part in (numel, offset, size, stride))
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + number + b"tQ"
    begin = b"\x80\2}X\5\0\0\0stepsctorch._utils\n_rebuild_tensor_v2\n("
    return begin + storage + b"".join(rest) + b"\x89ccollections\nOrderedDict\n)RtRs."


CLAIMS = [
    *((numel, 0, (1,), (1,)) for numel in (-1, 10**30)),
    *((64, 0, (size,), (1,)) for size in (-1, 10**9, "x")),
    *((64, 0, size, (1,) * len(size)) for size in ((2**32, 2**32), (1,) * 100)),
    (10**9, 0, (10**9,), (1,)),
    (64, 10**9, (1,), (1,)),
    (64, 0, (2, 2), (10**9, 1)),
    (64, 0, (10**12,), (0,)),
]
CONFIGURATIONS = [
    {"experts": 32, "dim": 8},
    *({"steps": steps} for steps in (0, -5)),
    *({"lr": lr} for lr in (math.nan, math.inf)),
    *({name: 10**9} for name in ("context", "workers", "batch_size", "grad_accum")),
    *({name: 0} for name in ("keep", "log_every", "save_every", "eval_every")),
    *({"dropout": 2.0}, {"seed": -1}, {"data": ("x", "--help")}, {"device": "meta"}),
    *({"heads": 3}, {"new": 1}, {"layers": 2**70}),
]
NAMES = (
    r"../../outside /etc/passwd FOLDER/../../outside C:\outside FOLDER/data.pkl FOLDER/DATA.PKL "
    "FOLDER/data/0 other/data.pkl / FOLDER"
).split()


def absurd_files(source: Path, state: dict, bomb: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes): sizes, strides, zip bombs that hold `bomb` bytes, names."""
    data, deflated, large = source.read_bytes(), zipfile.ZIP_DEFLATED, struct.pack("<I", 2**32 - 2)
    for place, shape in ((PLACES[3], (10**6, 10**6)), (PLACES[4], (10**12,))):
        for dtype in (torch.float32, torch.float64, torch.uint8):
            tensor = torch.zeros(1, dtype=dtype).expand(shape)
            yield f"{place} of {shape}, {dtype}", saved(replaced(state, place, tensor))
    changes = [{"config": {**state["config"], **one}} for one in CONFIGURATIONS]
    for change in [*changes, {"format_version": 2}, {"format_version": 4}]:
        yield f"{change}", saved({**state, **change})
    yield "compressed records", zipped(source, {}, deflated)
    yield "records with attributes", zipped(source, {}, attributes=0o600 << 16)
    yield "a zip bomb", zipped(source, {"/data/0": bytes(bomb)}, deflated)
    yield "a zip bomb of a pickle", zipped(source, {"data.pkl": bytes(bomb)}, deflated)
    yield "a huge record", data.replace(struct.pack("<II", 256, 256), large * 2)
    lists = b"]" * 10**6, b"(" * 10**5 + b"]" + b"t" * 10**5
    pickles = [*(b"\x80\2" + one + b"." for one in lists), *(claims(*one) for one in CLAIMS)]
    for change in [{"/data/3": None}, *({"data.pkl": one} for one in [None, *pickles])]:
        yield f"{change}"[:200], zipped(source, change)
    yield "names with a NUL", data.replace(b"/version", b"/vers\0on")


@pytest.mark.filterwarnings("ignore:Duplicate name")  # that is the trick
def test_hostile_checkpoints(fork, checkpoints, tmp_path, whole):
    source, path = checkpoints("standard"), tmp_path / "hostile.pt"
    state = t.load_checkpoint(source)
    # What is refused for its pickle needs no tensors.
    light = t.mapped(state, lambda one: repr(one) if isinstance(one, torch.Tensor) else one, {})
    calls = [*pickles_that_run_code(tmp_path / "executed"), *objects_of_any_size()]
    harmless = ["collections:Counter", "torch:Size"]
    what = "hostile checkpoints (code in pickles, absurd sizes, zip bombs, names) resumed"
    with Campaign(what) as campaign:

        def case(name: str, data: bytes, *may_be: object) -> None:
            campaign.case(name, refused, fork, path, data, *may_be)

        for number, call in enumerate(calls if whole else calls[::4]):
            name = call.function
            case(name, zipped(source, {"data.pkl": pickled(call)}))
            for place in PLACES if whole else [PLACES[number % len(PLACES)]]:
                if place != ("config", "data") or name not in harmless:
                    content = pickled(replaced(light, place, call))
                    case(f"{name} in {place}", zipped(source, {"data.pkl": content}))
        for name, data in absurd_files(source, state, bomb=2**30 if whole else 2**26):
            case(name, data)
        # Records more, that nobody reads, may do no harm, nor a name that is nowhere a path.
        for name in NAMES:
            case(f"a record named {name!r}", zipped(source, {}, more=[name]), True, state)
        many = [f"FOLDER/more{i}" for i in range(10**5 if whole else 10**4)]
        case("many records", zipped(source, {}, more=many), True, state)
        climbs = source.read_bytes().replace(b"archive/", b"../arch/")
        case("a folder behind ..", climbs, True, state)


WRONG = [None, "x", "", -1, 10**30, 1.5, math.nan, True, [], {}, (), torch.ones(3), [[[1]]]]
WRONG += [{1: {"a": 2}}, collections.OrderedDict(b=3)]
# What is inside of these is this program's own: no stranger gains by it.
OWN = {"config", "best", "evaluation", "metrics", "data_fingerprint", "loop", "stream"}
# And what a finished run does not need may be anything.
UNUSED = {"exit_reason", "torch_version", "saved_at", "made_by", "evaluation", "metrics"}


def every_place(state, keys=()) -> Iterator[tuple[tuple, object]]:
    """(keys, item) of everything in nested state, containers too."""
    for key in state if isinstance(state, dict) else range(len(state)):
        yield (*keys, key), state[key]
        if isinstance(state[key], (dict, list, tuple)):
            yield from every_place(state[key], (*keys, key))


def may_be(keys: tuple, right: object, wrong: object) -> bool:
    """Whether it may be taken as it is."""
    # What optimizers and schedulers hold is for their own load_state_dict.
    theirs = keys[0] in ("optimizer_state_dicts", "scheduler_state_dicts") and len(keys) > 2
    alike = isinstance(wrong, type(right)) or isinstance(right, type(wrong))
    return keys[0] in UNUSED or theirs or alike


def test_wrong_values(fork, checkpoints, tmp_path, whole):
    state = t.load_checkpoint(checkpoints("standard"))
    places = [place for place in every_place(state) if place[0][0] not in OWN or not place[0][1:]]
    cases = [(*place, wrong) for place in places for wrong in WRONG]
    with Campaign("wrong values under every key of a checkpoint, resumed") as campaign:
        for keys, right, wrong in cases if whole else cases[::167]:
            data, name = saved(replaced(state, keys, wrong)), f"{keys} = {wrong!r}"
            how = tmp_path / "wrong.pt", data, may_be(keys, right, wrong)
            campaign.case(name, refused, fork, *how)
