"""Every road on which ``torch.export.load`` lets a file run code, and that none of them is open here.

A payload touches a marker file. Where torch's own loader follows the road the marker is there afterwards, which shows
that the file is one that runs; where it takes a run of the program to do so, it is run, as a fold does.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.files.program import read_program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.c = torch.ones(2)

    def forward(self, x: Tensor, *, scale: dict[str, Tensor]) -> Any:
        y = self.bn(self.conv(x)).relu() * scale["a"]
        return {"y": y.reshape(y.shape[0] * 2, -1) + self.c.sum(), "n": x.shape[0] * 2 + 1}


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


Records = dict[str, bytes]
INPUTS = (torch.ones(4, 3, 8, 8),), {"scale": {"a": torch.ones(4, 4, 6, 6)}}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "net.pt2"
    any_size = torch.export.Dim.AUTO
    sizes = {"x": {0: any_size, 2: any_size}, "scale": {"a": {0: any_size, 2: any_size}}}
    torch.export.save(torch.export.export(Net().eval(), *INPUTS, dynamic_shapes=sizes), path)
    return path


def records_of(path: Path) -> Records:
    reader = torch._C.PyTorchFileReader(str(path))
    hidden = (".data/version", ".data/serialization_id", "byteorder")  # the writer adds them
    return {name: reader.get_record(name) for name in reader.get_all_records() if name not in hidden}


def written(path: Path, records: Records) -> Path:
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.set_min_version(6)
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def call(marker: Path) -> str:
    """The payload as an expression without a quote, a line or a space in it."""
    letters = "+".join(f"chr({ord(letter)})" for letter in str(marker))
    module = "+".join(f"chr({ord(letter)})" for letter in "pathlib")
    return f"__import__({module}).Path({letters}).touch()"


Change = Callable[[Any, Path], None]


def in_graph(change: Change) -> Callable[[Records, Path], None]:
    def altered(records: Records, marker: Path) -> None:
        model = json.loads(records["models/model.json"])
        change(model, marker)
        records["models/model.json"] = json.dumps(model).encode()

    return altered


def node(model: Any, name: str) -> Any:
    return next(n for n in model["graph_module"]["graph"]["nodes"] if n["name"] == name)


def renamed(model: Any, old: str, new: str) -> Any:
    return json.loads(json.dumps(model).replace(json.dumps(old), json.dumps(new)))


def root_call(model: Any) -> Any:
    return model["graph_module"]["module_call_graph"][0]["signature"]


# --- pickles


def sample_inputs(records: Records, marker: Path) -> None:
    records["data/sample_inputs/model.pt"] = saved(Payload(marker))


def bare_sample_inputs(records: Records, marker: Path) -> None:
    records["data/sample_inputs/model.pt"] = pickle.dumps(((), {"x": Payload(marker)}))


def pickled(kind: str, name: str) -> Callable[[Records, Path], None]:
    def altered(records: Records, marker: Path) -> None:
        config = json.loads(records[f"data/{kind}/model_{kind}_config.json"])
        entry = config["config"][name]
        entry["use_pickle"] = True
        records[f"data/{kind}/{entry['path_name']}"] = saved(Payload(marker))
        records[f"data/{kind}/model_{kind}_config.json"] = json.dumps(config).encode()

    return altered


def of_own_class(prefix: str) -> Callable[[Records, Path], None]:
    def altered(records: Records, marker: Path) -> None:
        config = json.loads(records["data/constants/model_constants_config.json"])
        config["config"]["c"] = {"path_name": f"{prefix}0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        records[f"data/constants/{prefix}0"] = pickle.dumps(Payload(marker))
        records["data/constants/model_constants_config.json"] = json.dumps(config).encode()

    return altered


def legacy(kind: str) -> Callable[[Records, Path], None]:
    def altered(records: Records, marker: Path) -> None:
        records[f"data/{kind}/model.pt"] = saved(Payload(marker))

    return altered


def second_model(records: Records, marker: Path) -> None:
    for name in list(records):
        if "model" in name:
            records[name.replace("model.", "other.").replace("model_", "other_")] = records[name]
    records["data/sample_inputs/other.pt"] = saved(Payload(marker))


# --- text that becomes code


def size(model: Any, marker: Path) -> None:
    model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = call(marker)


def size_of_a_number(model: Any, marker: Path) -> None:
    values = model["graph_module"]["graph"]["sym_int_values"]
    next(iter(values.values()))["as_expr"]["expr_str"] = f"Add({call(marker)!r}, Integer(2))"


def size_in_disguise(model: Any, marker: Path) -> None:
    expression = f"Symbol('s54', positive={call(marker)}, integer=True)"
    model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = expression


def guard(model: Any, marker: Path) -> None:
    model["guards_code"].append(f"{call(marker)} is None")


def guard_message(model: Any, marker: Path) -> None:
    model["guards_code"].append(f"L['x'].size()[0] != 'it\\'s\" + str({call(marker)}) + \"'")


def input_constant(model: Any, marker: Path) -> None:
    text = f"' or {call(marker)} or '"
    graph = model["graph_module"]["graph"]
    graph["inputs"].append({"as_string": text})
    model["graph_module"]["signature"]["input_specs"].append(
        {"constant_input": {"name": "mode", "value": {"as_string": text}}}
    )


def value_name(model: Any, marker: Path) -> None:
    model.update(renamed(model, "relu", f"relu = {call(marker)} or 1; relu"))


def input_name(model: Any, marker: Path) -> None:
    model.update(renamed(model, "scale_a", f"scale_a={call(marker)}"))


def parameter_name(model: Any, marker: Path) -> None:
    model.update(renamed(model, "conv.weight", f'conv.x") or {call(marker)} or str("'))


def argument_name(model: Any, marker: Path) -> None:
    root_call(model)["forward_arg_names"] = ["x", f"scale={call(marker)}"]


def keyword_name(model: Any, marker: Path) -> None:
    root_call(model)["forward_arg_names"] = None
    root_call(model)["in_spec"] = root_call(model)["in_spec"].replace('\\"scale\\"', f'\\"scale={call(marker)}\\"')


# --- functions and modules by their names


def function(model: Any, marker: Path) -> None:
    command = {"name": "", "arg": {"as_string": f"touch {marker}"}, "kind": 1}
    graph = model["graph_module"]["graph"]
    graph["nodes"].insert(0, {"target": "torch.os.system", "inputs": [command], "outputs": [], "metadata": {},
                              "is_hop_single_tensor_return": None, "name": "system"})  # fmt: skip
    model["verifiers"] = []


def library(model: Any, marker: Path) -> None:
    node(model, "relu")["target"] = "torch.ops.load_library"


def file_operator(model: Any, marker: Path) -> None:
    node(model, "relu").update(
        target="torch.ops.aten.from_file.default",
        inputs=[
            {"name": "filename", "arg": {"as_string": str(marker)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 1}, "kind": 1},
        ],
    )


def operator_as_argument(model: Any, marker: Path) -> None:
    node(model, "relu")["inputs"].append({"name": "op", "arg": {"as_operator": "torch.os.system"}, "kind": 2})


def caller(model: Any, marker: Path) -> None:
    node(model, "mul_1")["target"] = "_operator.methodcaller"


def own_class(model: Any, marker: Path) -> None:
    model["graph_module"]["graph"]["custom_obj_values"] = {"c": {"name": "c", "class_fqn": "__torch__.torch.classes.C"}}


def imported(spec: str) -> Change:
    def altered(model: Any, marker: Path) -> None:
        (marker.parent / "payload.py").write_text(f"{call(marker)}\nfrom enum import Enum\nclass E(Enum):\n    A = 1\n")
        root_call(model)["out_spec"] = spec

    return altered


_LEAF = '{"type": null, "context": null, "children_spec": []}'
DEFAULTDICT = json.dumps({"default_factory_module": "payload", "default_factory_name": "E", "dict_context": ["y", "n"]})
DEFAULTDICT_SPEC = (
    f'[1, {{"type": "collections.defaultdict", "context": {DEFAULTDICT}, "children_spec": [{_LEAF}, {_LEAF}]}}]'
)
ENUM = json.dumps(json.dumps([{"__enum__": True, "fqn": "payload:E", "name": "A"}, "n"]))
ENUM_SPEC = f'[1, {{"type": "builtins.dict", "context": {ENUM}, "children_spec": [{_LEAF}, {_LEAF}]}}]'


# --- compiled code


def compiled(records: Records, marker: Path) -> None:
    records["data/aotinductor/model/model.so"] = b"\x7fELF"


def shape_of_nothing(records: Records, marker: Path) -> None:
    config = json.loads(records["data/constants/model_constants_config.json"])
    config["config"]["c"]["tensor_meta"]["sizes"] = [{"as_int": 2**40}]
    records[f"data/constants/{config['config']['c']['path_name']}"] = b""
    records["data/constants/model_constants_config.json"] = json.dumps(config).encode()


def power(model: Any, marker: Path) -> None:
    model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = "9**9**9**9"


# whether torch runs the payload: when it loads the file, or runs the program
ROADS: dict[str, tuple[Callable[[Records, Path], None], bool]] = {
    "sample inputs": (sample_inputs, True),
    "sample inputs, not zipped": (bare_sample_inputs, True),
    "pickled weight": (pickled("weights", "conv.weight"), True),
    "pickled constant": (pickled("constants", "c"), True),
    "TorchScript object": (of_own_class("custom_obj_"), False),
    "opaque object": (of_own_class("opaque_obj_"), True),
    "legacy weights": (legacy("weights"), True),
    "legacy constants": (legacy("constants"), True),
    "second model": (second_model, True),
    "size": (in_graph(size), True),
    "size of a number": (in_graph(size_of_a_number), False),
    "size in disguise": (in_graph(size_in_disguise), True),
    "guard": (in_graph(guard), True),
    "message of a guard": (in_graph(guard_message), True),
    "constant input": (in_graph(input_constant), False),
    "name of a value": (in_graph(value_name), False),
    "name of an input": (in_graph(input_name), True),
    "name of a parameter": (in_graph(parameter_name), False),
    "name of an argument": (in_graph(argument_name), False),
    "keyword": (in_graph(keyword_name), False),
    "function": (in_graph(function), False),
    "library": (in_graph(library), False),
    "file": (in_graph(file_operator), True),
    "operator as an argument": (in_graph(operator_as_argument), False),
    "caller": (in_graph(caller), False),
    "class": (in_graph(own_class), False),
    "import of a default": (in_graph(imported(DEFAULTDICT_SPEC)), True),
    "import of an enumeration": (in_graph(imported(ENUM_SPEC)), True),
    "compiled code": (compiled, False),
    "size without values": (shape_of_nothing, False),
    "power": (in_graph(power), False),
}


@pytest.mark.every(6)
@pytest.mark.parametrize("road", ROADS)
def test_no_road_to_code_is_open(road: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    change, is_run_by_torch = ROADS[road]
    marker = tmp_path / "marker"
    records = records_of(good)
    change(records, marker)
    path = written(tmp_path / "net.pt2", records)
    with pytest.raises(InputError, match=r"expected a program .* it holds .*\. Nothing in it was run\."):
        read_program(path)
    assert not marker.exists()
    if is_run_by_torch:
        monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
        with contextlib.suppress(Exception):
            torch.export.load(path).module()(*INPUTS[0], **INPUTS[1])
        assert marker.exists(), "the payload never runs: this file tests nothing"


def test_a_good_program_is_read(good: Path) -> None:
    args, kwargs = (torch.randn(5, 3, 9, 8),), {"scale": {"a": torch.randn(5, 4, 7, 6)}}
    expected, got = (load(good).module()(*args, **kwargs) for load in (torch.export.load, read_program))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_rewritten_archive_is_read(good: Path, tmp_path: Path) -> None:
    read_program(written(tmp_path / "net.pt2", records_of(good)))


def zipped(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def entries_of(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "compression", "said"),
    [
        (lambda entries: entries, zipfile.ZIP_DEFLATED, "compressed records"),
        (lambda entries: [*entries, entries[0]], zipfile.ZIP_STORED, "two records of one name"),
        (lambda entries: [*entries, ("net/../../evil", b"")], zipfile.ZIP_STORED, "outside of the archive"),
        (lambda entries: [*entries, ("version", b"8.20")], zipfile.ZIP_STORED, "no archive of torch's"),
        (lambda entries: [*entries, ("net/data/other", b"")], zipfile.ZIP_STORED, "no part of a program"),
        (
            lambda entries: [("version", b"8.20"), ("serialized_exported_program.json", b"{}")],
            zipfile.ZIP_STORED,
            "holds",
        ),
        (lambda entries: [], zipfile.ZIP_STORED, "no archive of torch's"),
    ],
)
def test_an_archive_that_is_not_plain_is_refused(
    good: Path, tmp_path: Path, change: Any, compression: int, said: str
) -> None:
    path = zipped(tmp_path / "net.pt2", change(entries_of(good)), compression)
    with pytest.raises(InputError, match=said):
        read_program(path)


def test_records_that_overlap_are_refused(good: Path, tmp_path: Path) -> None:
    """A stored record may be listed as often as one likes: it then unpacks to many times the size of the file."""
    data = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        first = archive.infolist()[0]
    at = data.rindex(first.filename.encode()) - 46  # its entry in the central directory
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + 20 : at + 28] = (len(data) - first.header_offset - 1000).to_bytes(4, "little") * 2
    path = tmp_path / "net.pt2"
    path.write_bytes(data)
    with pytest.raises(InputError, match="unpack to more than the file holds"):
        read_program(path)


def test_example_inputs_that_are_objects_are_told(good: Path, tmp_path: Path) -> None:
    records = records_of(good)
    records["data/sample_inputs/model.pt"] = saved((nn.Linear(1, 1),))
    with pytest.raises(
        InputError, match=r"it holds Python objects, which only unpickling would read, and that can run"
    ):
        read_program(written(tmp_path / "net.pt2", records))


def test_what_is_loaded_is_what_was_looked_at(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another process replaces after the look is not read again."""
    path = tmp_path / "net.pt2"
    path.write_bytes(good.read_bytes())
    records = records_of(good)
    sample_inputs(records, tmp_path / "marker")
    evil = written(tmp_path / "evil.pt2", records).read_bytes()
    from batchnorm.files.program import read

    def look_and_replace(data: bytes) -> None:
        genuine(data)
        path.write_bytes(evil)

    genuine = read._look_into_archive
    monkeypatch.setattr(read, "_look_into_archive", look_and_replace)
    read_program(path)
    assert not (tmp_path / "marker").exists()
