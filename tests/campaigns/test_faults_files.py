"""Campaigns: damaged checkpoints and hostile ones are refused in one line, or load as what they were."""

import collections
import functools
import io
import math
import pickle
import random
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from driver import SCHEDULE, SMALL, Campaign
from helpers import TINY, Child, Moment, assert_same

import train_graceful as t


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints(name): one of a finished run, made once: small ones by mode, and a larger one, which takes memory worth measuring."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "corpus.txt").write_bytes(
        b"".join(b"%d squared is %d; " % (n, n * n) for n in range(300))
    )

    @functools.cache
    def get(name: str) -> Path:
        mode, size = (
            ("standard", [*TINY, "--dim", "128", "--layers", "4"])
            if name == "large"
            else (name, SMALL)
        )
        child = Child(
            "--data",
            folder / "corpus.txt",
            *size,
            *SCHEDULE,
            "--mode",
            mode,
            "--checkpoint-dir",
            folder / name,
        )
        child.finish()
        assert child.exitcode == 0
        return folder / name / "final.pt"

    return get


def resume(fork, path, original=None) -> tuple[int, str, int]:
    """(exit code, output, peak memory in KiB) of resuming a finished run, whose state has to be the original's."""

    def compare(frame) -> None:
        state = frame.f_locals.get("state")
        if original is not None and isinstance(state, dict):
            assert_same(state, original)

    child = fork(
        "--resume",
        path,
        "--checkpoint-dir",
        path.parent,
        plan=[(Moment("prepared", event="return"), compare)],
    )
    output = child.finish()
    return child.exitcode, output, child.peak


def assert_refused(code: int, output: str) -> None:
    assert code == 2, output[-3000:]
    # PyTorch's own, before the error, of a tensor that stands where an optimizer's state belongs.
    output = re.sub(
        r"[^\r\n]*UserWarning: Using a non-tuple sequence[^\r\n]*\r\n  [^\r\n]*\r\n\r\n", "", output
    )
    output = output.rstrip().rpartition("\r")[2]  # of a slow one, the status line has been erased
    assert output.startswith("error: ") and "\n" not in output, output[-3000:]


def damaged_versions(data: bytes, count: int, rng: random.Random):
    """(name, bytes) of about count damaged versions."""
    directory = data.rindex(
        b"PK\1\2", 0, data.index(b"PK\1\2") + 4
    )  # where the zip file's own directory begins
    for i in range(count * 5 // 10):  # spread evenly over the file
        yield flipped(data, int((i + rng.random()) * len(data) * 8 / (count * 5 // 10)))
    for _ in range(count * 2 // 10):  # every bit of the directory carries something
        yield flipped(data, rng.randrange(directory * 8, len(data) * 8))
    for _ in range(count // 20):
        position = rng.randrange(len(data))
        yield (
            f"byte {position} replaced",
            data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :],
        )
    sizes = {
        0,
        1,
        2,
        3,
        4,
        21,
        22,
        30,
        100,
        len(data) - 1,
        len(data) - 2,
        len(data) - 22,
        directory,
        directory - 1,
    }
    sizes |= {2**k for k in range(len(data).bit_length())} | {
        rng.randrange(len(data)) for _ in range(count // 20)
    }
    for size in sorted(size for size in sizes if size < len(data)):
        yield f"cut to {size}", data[:size]
    for _ in range(count // 20):
        size = rng.choice([16, 64, 512, 4096])
        first, second = (rng.randrange(len(data) // size) * size for _ in range(2))
        swapped = bytearray(data)
        swapped[first : first + size], swapped[second : second + size] = (
            data[second : second + size],
            data[first : first + size],
        )
        if len(swapped) == len(data):
            yield f"{size} bytes swapped at {first} and {second}", bytes(swapped)
    for i in range(count // 20):
        size = rng.choice([1, 22, 64, 512, 4096, len(data) // 2, len(data)])
        yield f"last {size} bytes zero ({i})", data[:-size] + bytes(size)
        start = rng.randrange(len(data))
        yield (
            f"{size} bytes zero at {start}",
            (data[:start] + bytes(size) + data[start + size :])[: len(data)],
        )
    for size in (1, 22, 1000, 70_000):
        yield f"{size} random bytes", rng.randbytes(size)
        yield f"{size} random bytes behind", data + rng.randbytes(size)
        yield f"{size} random bytes before", rng.randbytes(size) + data
    yield "twice", data + data
    yield "nothing but zeros", bytes(len(data))
    yield "another pickle", pickle.dumps({"step": 1})
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as archive:
            archive.writestr("word/document.xml", "<hello/>" * 1000)
        yield f"another zip file ({compression})", stream.getvalue()
    stream = io.BytesIO()
    torch.save(torch.ones(3), stream)
    yield "another program's torch.save", stream.getvalue()
    yield "an empty zip file", b"PK\5\6" + bytes(18)


def flipped(data: bytes, bit: int) -> tuple[str, bytes]:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return f"bit {bit} flipped", bytes(changed)


def peak_of_loading_nothing(fork, path: Path) -> int:
    """A fork's memory starts with that of this process, which grows: to be measured again from time to time."""
    return resume(fork, path.with_name("missing.pt"))[2]


def refused_or_the_same(fork, path: Path, data: bytes, original: dict, allowed: int) -> None:
    path.write_bytes(data)
    code, output, peak = resume(fork, path, original)
    if code == 0:
        assert "Nothing left to do" in output
    else:
        assert_refused(code, output)
    assert peak <= allowed, f"{peak} KiB"


def test_rotten_bits(fork, checkpoints, tmp_path, whole):
    """Twice the memory of a good load is what a damaged one may take, beyond what a child takes that loads nothing."""
    with Campaign(
        "damaged checkpoints (flipped bits, cuts, swaps, zeros, other files) resumed"
    ) as campaign:
        for name, count in (
            {"standard": 1300, "geometric": 1300, "large": 300}.items()
            if whole
            else {"geometric": 30}.items()
        ):
            original, data = t.load_checkpoint(checkpoints(name)), checkpoints(name).read_bytes()
            path = tmp_path / "damaged.pt"
            code, output, good = resume(fork, checkpoints(name), original)
            assert code == 0, output
            good = max(good - peak_of_loading_nothing(fork, path), 4096)
            for number, (kind, damaged) in enumerate(
                damaged_versions(data, count, random.Random(name))
            ):
                if number % 50 == 0:
                    allowed = peak_of_loading_nothing(fork, path) + 2 * good
                campaign.case(
                    f"{name}: {kind}", refused_or_the_same, fork, path, damaged, original, allowed
                )


def structure_bits(path: Path) -> list[int]:
    """All bits of the file that are not in a tensor: headers, padding, pickle, directory."""
    data = path.read_bytes()
    tensors = set()
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                name, extra = struct.unpack(
                    "<HH", data[record.header_offset + 26 : record.header_offset + 30]
                )
                start = record.header_offset + 30 + name + extra
                tensors |= set(range(start, start + record.file_size))
    return [8 * byte + bit for byte in range(len(data)) if byte not in tensors for bit in range(8)]


def test_bits_of_the_structure(checkpoints, tmp_path, whole):
    """A zip file says some things twice; zipfile and torch may believe different ones. In this process, for there are many."""

    def check(bit: int) -> None:
        path.write_bytes(flipped(data, bit)[1])
        try:
            state = t.load_checkpoint(path)
        except t.CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert_same(state, original)

    with Campaign("bits all over a checkpoint outside its tensors flipped, loaded") as campaign:
        source, path = checkpoints("standard"), tmp_path / "damaged.pt"
        original, data = t.load_checkpoint(source), source.read_bytes()
        for bit in structure_bits(source)[:: 7 if whole else 251]:
            campaign.case(f"bit {bit}", check, bit)


class Calls:
    """Pickles as a call of any function, which unpickling would make."""

    def __init__(self, module: str, name: str, *arguments) -> None:
        self.module, self.name, self.arguments = module, name, arguments


class Pickler(
    pickle._Pickler
):  # the one in Python, which can be taught to write a GLOBAL of anything
    def save(self, value, save_persistent_id=True) -> None:
        if isinstance(value, Calls):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
            super().save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def pickled(value: object) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


def with_pickle(source: Path, content: bytes) -> bytes:
    """A whole checkpoint file whose pickle is another, checksums right."""
    return zipped(
        source, lambda name, old: [(name, content if name.endswith("/data.pkl") else old)]
    )


def zipped(source: Path, change, compression=zipfile.ZIP_STORED, attributes=0) -> bytes:
    """A whole checkpoint file with other records, checksums right; torch.save's have no attributes, and with some it is refused for them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            for name, content in change(record.filename, old.read(record)):
                new.writestr(name, content)
        for record in new.infolist():
            record.external_attr = attributes
    return stream.getvalue()


def saved(state: dict) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def pickles_that_run_code(marker: Path):
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    yield from [
        Calls("os", "system", touch),
        Calls("posix", "system", touch),
        Calls("builtins", "eval", code),
        Calls("builtins", "exec", code),
        Calls("__builtin__", "eval", code),
        Calls("subprocess", "Popen", ("touch", str(marker))),
        Calls("subprocess", "check_output", ("touch", str(marker))),
        Calls("pty", "spawn", ("touch", str(marker))),
        Calls("builtins", "open", str(marker), "w"),
        Calls("runpy", "run_path", str(marker)),
        Calls("shutil", "rmtree", str(marker.parent)),
        Calls("pathlib", "Path.touch", str(marker)),
        Calls("importlib", "import_module", "antigravity"),
        Calls("functools", "partial", Calls("os", "system", touch)),
        Calls("builtins", "map", Calls("os", "system", touch)),
        Calls("builtins", "getattr", Calls("importlib", "import_module", "os"), "system"),
        Calls("torch", "load", str(marker)),
        Calls("torch.hub", "load", "a/b", "c"),
        Calls("torch.serialization", "load", str(marker)),
        Calls("torch._utils", "_import_dotted_name", "os.system"),
        Calls("operator", "methodcaller", "system", touch),
        Calls("codeop", "compile_command", code),
        Calls("types", "FunctionType", 1),
        Calls("torch", "compile", code),
        Calls("torch.jit", "load", str(marker)),
        Calls("numpy.core.multiarray", "_reconstruct", 1),
        Calls("collections", "OrderedDict", Calls("os", "system", touch)),
    ]


def objects_of_any_size():
    yield from [
        Calls("builtins", "bytearray", 4 * 10**9),
        Calls("torch", "Tensor", 2 * 10**8),
        Calls("torch", "FloatStorage", 10**10),
        Calls("torch", "UntypedStorage", 10**10),
        Calls("torch.nn.parameter", "Parameter", Calls("torch", "Tensor", 10**10)),
        Calls("builtins", "set", [1]),
        Calls("collections", "Counter", [1]),
        Calls("builtins", "bytes", 10**10),
        Calls("builtins", "range", 10**10),
        Calls("torch", "zeros", 10**10),
        Calls("torch._utils", "_rebuild_meta_tensor_no_storage", 1),
        Calls("itertools", "repeat", 1),
        Calls("_codecs", "encode", Calls("_codecs", "encode", b"x" * 1000, "hex"), "hex"),
        Calls("torch", "Size", (10**18, 10**18)),
    ]


def in_places(state: dict, value: object):
    """(name, state with value at one of the places where it might be looked at)."""

    def put(*keys):
        changed = pickle_copy(state)
        place = changed
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return "/".join(map(str, keys)), changed

    optimizer = next(iter(state["optimizer_state_dicts"]))
    yield put("saved_at")
    yield put("optimizer_state_dicts", optimizer, "state", 0, "exp_avg")
    yield put("optimizer_state_dicts", optimizer, "param_groups", 0, "lr")
    yield put("config", "data")
    yield put("model_state_dict", "head.weight")
    yield put("scheduler_state_dicts", optimizer, "lr_lambdas", 0)
    yield put("best", "value")


def pickle_copy(state):
    """The nested containers anew; tensors become their names, since what is refused for its pickle needs none."""
    if isinstance(state, dict):
        return {key: pickle_copy(item) for key, item in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(pickle_copy, state))
    return repr(state) if isinstance(state, torch.Tensor) else state


def claims(numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """The pickle of a tensor on record 0 that claims to be this large."""
    storage = (
        b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
        + pickle.dumps(numel, 2)[2:-1]
        + b"tQ"
    )
    plain = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride))
    return (
        b"\x80\2}X\5\0\0\0stepsctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + plain
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def absurd_files(source: Path, state: dict, bomb: int, records: int):
    """(name, bytes): sizes, strides, zip bombs that hold `bomb` bytes, so many records, names."""
    data = source.read_bytes()
    for numel, offset, size, stride in [
        (10**9, 0, (10**9,), (1,)),
        (2**62, 0, (2**62,), (1,)),
        (64, 0, (10**9,), (1,)),
        (64, 10**9, (1,), (1,)),
        (64, 0, (2, 2), (10**9, 1)),
        (-1, 0, (1,), (1,)),
        (64, -64, (1,), (1,)),
        (64, 0, (-1,), (1,)),
        (64, 0, (2**32, 2**32), (1, 1)),
        (64, 0, (8,), (-1,)),
        (0, 0, (1,), (1,)),
        (10**30, 0, (1,), (1,)),
        (64, 0, (1,) * 100, (1,) * 100),
        (64, 0, ("x",), (1,)),
        (64, 0, (10**12,), (0,)),
    ]:
        yield (
            f"a tensor of {numel} at {offset}, {str(size)[:30]}, {str(stride)[:30]}",
            with_pickle(source, claims(numel, offset, size, stride)),
        )
    for keys, shape in [
        (("model_state_dict", "head.weight"), (10**6, 10**6)),
        (("optimizer_state_dicts", "adamw", "state", 0, "exp_avg"), (10**12,)),
    ]:
        for dtype in (torch.float32, torch.float64, torch.uint8):
            yield (
                f"{keys[-1]} expanded to {shape} of {dtype}",
                saved(replaced(state, keys, torch.zeros(1, dtype=dtype).expand(shape))),
            )
    for config in [
        {"experts": 32, "dim": 8},
        {"context": 10**9},
        {"layers": 2**70},
        {"workers": 10**6},
        {"batch_size": 10**15},
        {"grad_accum": 10**15},
        {"steps": 0},
        {"steps": -5},
        {"dropout": 2.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"seed": -1},
        {"data": ("x", "--help")},
        {"device": "meta"},
        {"heads": 3},
        {"keep": 0},
        {"log_every": 0},
        {"save_every": 0},
        {"eval_every": 0},
        {"new": 1},
    ]:
        yield f"config {config}", saved({**state, "config": {**state["config"], **config}})

    for version in (2, 4):
        yield f"format {version}", saved({**state, "format_version": version})

    def append(name: str, content: bytes = b"x") -> bytes:
        first = data[data.index(b"PK\3\4") + 30 :].split(b"/")[0].decode()
        stream = io.BytesIO(data)
        with zipfile.ZipFile(stream, "a") as archive:
            archive.writestr(name.replace("FOLDER", first), content)
            archive.infolist()[-1].external_attr = 0
        return stream.getvalue()

    yield (
        "compressed records",
        zipped(source, lambda name, content: [(name, content)], zipfile.ZIP_DEFLATED),
    )
    yield (
        "records with attributes",
        zipped(source, lambda name, content: [(name, content)], attributes=0o600 << 16),
    )
    yield (
        "a zip bomb",
        zipped(
            source,
            lambda name, content: [(name, content if "/data/0" not in name else bytes(bomb))],
            zipfile.ZIP_DEFLATED,
        ),
    )
    yield (
        "a zip bomb of a pickle",
        zipped(
            source,
            lambda name, content: [(name, content if "data.pkl" not in name else bytes(bomb))],
            zipfile.ZIP_DEFLATED,
        ),
    )
    yield "a pickle of lists", with_pickle(source, b"\x80\2" + b"]" * 10**6 + b".")
    yield (
        "a deep pickle",
        with_pickle(source, b"\x80\2" + b"(" * 10**5 + b"]" + b"t" * 10**5 + b"."),
    )
    yield (
        "a record that claims to be huge",
        data.replace(struct.pack("<II", 256, 256), struct.pack("<II", 2**32 - 2, 2**32 - 2)),
    )
    yield (
        f"{records} records",
        zipped(
            source,
            lambda name, content: (
                [(name, content)]
                + (
                    [(f"{name}{i}", b"") for i in range(records)]
                    if name.endswith("/version")
                    else []
                )
            ),
        ),
    )
    for name in [
        "../../outside",
        "/etc/passwd",
        "FOLDER/../../outside",
        "C:\\outside",
        "FOLDER/data.pkl",
        "FOLDER/DATA.PKL",
        "FOLDER/data/0",
        "other/data.pkl",
        "/",
        "FOLDER",
    ]:
        yield f"a record named {name!r}", append(name)
    yield "names with a NUL", data.replace(b"/version", b"/vers\0on")
    yield (
        "no pickle",
        zipped(
            source, lambda name, content: [] if name.endswith("data.pkl") else [(name, content)]
        ),
    )
    yield (
        "a missing tensor",
        zipped(source, lambda name, content: [] if name.endswith("data/3") else [(name, content)]),
    )
    yield (
        "a folder named ..",
        zipped(source, lambda name, content: [("../" + name.partition("/")[2], content)]),
    )


def replaced(state, keys: tuple, value: object):
    """A copy of nested state in which the item at keys is value."""
    if not keys:
        return value
    changed = list(state) if isinstance(state, (list, tuple)) else dict(state)
    changed[keys[0]] = replaced(state[keys[0]], keys[1:], value)
    return tuple(changed) if isinstance(state, tuple) else changed


def every_place(state, keys=()):
    """The keys of everything in nested state, containers too."""
    for key in state if isinstance(state, dict) else range(len(state)):
        yield (*keys, key)
        if isinstance(state[key], (dict, list, tuple)):
            yield from every_place(state[key], (*keys, key))


def at(state, keys):
    for key in keys:
        state = state[key]
    return state


def refused_unharmed(
    fork, path: Path, data: bytes, marker: Path, allowed: int, original=None
) -> None:
    path.write_bytes(data)
    code, output, peak = resume(fork, path, original)
    if original is None or code:
        assert_refused(code, output)
    assert not marker.exists()
    assert peak <= allowed, f"{peak} KiB"


def refused_or_of_its_type(fork, path: Path, data: bytes, same_type: bool) -> None:
    path.write_bytes(data)
    code, output, _ = resume(fork, path)
    if not (same_type and code == 0):
        assert_refused(code, output)


@pytest.mark.filterwarnings("ignore:Duplicate name")  # that is the trick
def test_hostile_checkpoints(fork, checkpoints, tmp_path, whole):
    source = checkpoints("standard")
    state, path, marker = t.load_checkpoint(source), tmp_path / "hostile.pt", tmp_path / "executed"
    allowed = (
        peak_of_loading_nothing(fork, path) + 300_000
    )  # KiB: a hundred thousand records and as many lists take some; no bomb goes off

    with Campaign(
        "hostile checkpoints (code in pickles, absurd sizes, zip bombs, names) resumed"
    ) as campaign:
        calls = [*pickles_that_run_code(marker), *objects_of_any_size()]
        shown = {"system", "eval", "bytearray", "Tensor"}
        first = [
            ("saved_at", "system"),
            ("config/data", "eval"),
            ("best/value", "bytearray"),
            ("model_state_dict/head.weight", "Tensor"),
        ]
        for number, call in enumerate(calls):
            if not whole and number % 6 and call.name not in shown:
                continue
            campaign.case(
                f"{call.module}.{call.name}",
                refused_unharmed,
                fork,
                path,
                with_pickle(source, pickled(call)),
                marker,
                allowed,
            )
            for place, changed in in_places(state, call):
                if place == "config/data" and call.name in ("Counter", "Size"):
                    continue  # harmless, and no stranger's gain: see below
                if whole or (place, call.name) in first:
                    campaign.case(
                        f"{call.module}.{call.name} in {place}",
                        refused_unharmed,
                        fork,
                        path,
                        with_pickle(source, pickled(changed)),
                        marker,
                        allowed,
                    )
        for name, data in absurd_files(
            source, state, bomb=2**30 if whole else 2**26, records=10**5 if whole else 10**4
        ):
            # A record more, that nobody reads, may do no harm, nor a name that is nowhere a path.
            original = (
                state if name.startswith(("a record named", "a folder named", "10000")) else None
            )
            campaign.case(name, refused_unharmed, fork, path, data, marker, allowed, original)

    with Campaign("wrong values under every key of a checkpoint, resumed") as campaign:
        wrong = [
            None,
            "x",
            "",
            -1,
            10**30,
            1.5,
            math.nan,
            True,
            [],
            {},
            (),
            torch.ones(3),
            [[[1]]],
            {1: {"a": 2}},
            collections.OrderedDict(b=3),
        ]
        # What is inside config, best, evaluation, metrics, loop and stream is this program's own: no stranger gains by it.
        inside = {"config", "best", "evaluation", "metrics", "data_fingerprint", "loop", "stream"}
        places = [keys for keys in every_place(state) if len(keys) == 1 or keys[0] not in inside]
        for i, (keys, value) in enumerate((keys, value) for keys in places for value in wrong):
            if whole or i % 167 == 0:
                same_type = (
                    type(at(state, keys)) is type(value)
                    or isinstance(value, dict)
                    and isinstance(at(state, keys), dict)
                )
                # What optimizers and schedulers hold is for their own load_state_dict: it is refused, or taken as it is.
                same_type |= value is True and type(at(state, keys)) is int
                same_type |= (
                    keys[0] in ("optimizer_state_dicts", "scheduler_state_dicts") and len(keys) > 2
                )
                # And what a finished run does not need may be anything.
                same_type |= keys[0] in (
                    "exit_reason",
                    "torch_version",
                    "saved_at",
                    "evaluation",
                    "metrics",
                )
                campaign.case(
                    f"{keys} = {value!r}",
                    refused_or_of_its_type,
                    fork,
                    path,
                    saved(replaced(state, keys, value)),
                    same_type,
                )
