"""Which strings a program's text may hold, and what is said of others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchnorm.errors import InputError
from batchnorm.files.program.text import UntrustedError, look_into_config, look_into_graph


def graph(value: Any) -> bytes:
    return json.dumps(value).encode()


LEAF = {"type": None, "context": None, "children_spec": []}


def structure(*specs: Any) -> str:
    return json.dumps([1, *specs])


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"torch_version": "2.13.0+cpu 'nightly'"},
        {"expr_str": "2*s0", "guards_code": ["L['x'].size()[0] >= 2"]},
        {"nodes": [{"target": "torch.ops.aten.relu.default", "inputs": [{"arg": {"as_string": "it's \"quoted\""}}]}]},
        {"nodes": [{"metadata": {"stack_trace": "File \"net.py\", line 3\n  it's"}}]},
        {"fqn": "layer1.0.conv weight", "name": ""},
        {"tensor_values": {"x_1": {"dtype": 7}}, "range_constraints": {"s0": {"min_val": 2}}},
        {"custom_obj_values": {}},
        {"in_spec": structure({"type": "builtins.dict", "context": '["mode name"]', "children_spec": [LEAF]})},
        {"out_spec": structure({"type": "collections.defaultdict", "context": json.dumps(
            {"default_factory_module": "builtins", "default_factory_name": "list", "dict_context": ["a"]}
        ), "children_spec": [LEAF]})},
    ],
)  # fmt: skip
def test_plain_programs(value: Any) -> None:
    look_into_graph(graph(value))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"expr_str": "exit()"}, "as a size, 'exit()', which is no arithmetic on sizes"),
        ({"range_constraints": {"exit()": {}}}, "as a size, 'exit()', which is no arithmetic on sizes"),
        ({"guards_code": ["exit()"]}, "as a condition, 'exit()', which is none on the sizes of inputs"),
        ({"a": [{"target": "torch.os.system"}]}, "a call of 'torch.os.system', which is no operator of torch's"),
        ({"as_operator": "os.system"}, "a call of 'os.system', which is no operator of torch's"),
        ({"name": "x = 1"}, "'x = 1' as a name, which is none in Python"),
        ({"tensor_values": {"x y": {}}}, "'x y' as a name, which is none in Python"),
        ({"fqn": 'a"b'}, "'a\"b' as the name of a layer or parameter"),
        ({"inputs": [{"as_string": "it's"}]}, "\"it's\" as an input"),
        ({"anything": "two words"}, "'two words' as its 'anything'"),
        ({"no word": 1}, "an entry of the name 'no word'"),
        ({"as_custom_obj": {"name": "c"}}, "an object of a class of its own"),
        ({"metadata": ["x"]}, "notes that are no text"),
        ({"metadata": {"x": 1}}, "notes that are no text"),
        ({"in_spec": "{"}, "inputs or outputs of an unknown structure, '{'"),
        ({"in_spec": "{}"}, "inputs or outputs of an unknown structure"),
        ({"in_spec": structure({"type": "os; x"})}, "inputs or outputs of an unknown structure"),
        ({"in_spec": structure({"context": '["it\'s"]'})}, "as the name of an input"),
        ({"out_spec": structure({"context": '[{"__enum__": true}]'})}, "an enumeration among the names"),
        ({"out_spec": structure({"context": '{"default_factory_module": "os", "default_factory_name": "getcwd"}'})},
         "an import of 'os.getcwd', to make what a dictionary lacks"),
        ({"in_spec": structure({"type": "builtins.tuple", "children_spec": [
            LEAF, {"type": "builtins.dict", "context": '["x y"]', "children_spec": [LEAF]}]})},
         "a keyword argument that is no name in Python"),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_told(value: Any, said: str) -> None:
    with pytest.raises(UntrustedError) as caught:
        look_into_graph(graph(value))
    assert said in str(caught.value)
    assert isinstance(caught.value, InputError)


def test_a_long_text_is_told_by_its_beginning() -> None:
    with pytest.raises(UntrustedError) as caught:
        look_into_graph(graph({"expr_str": "exit()" * 1000}))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("data", "said"), [(b"\xff", "no JSON"), (b"{", "no JSON"), (b"[]", "no JSON object"), (b"[" * 10**5, "no JSON")]
)
def test_what_is_no_text_of_a_program_is_told(data: bytes, said: str) -> None:
    for look in (look_into_graph, lambda data: look_into_config(data, "weight_", ())):
        with pytest.raises(UntrustedError, match=said):
            look(data)


def entry(**changes: Any) -> bytes:
    plain = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": {"sizes": [{"as_int": 3}]}}
    return graph({"config": {"conv.weight": plain | changes}})


def test_tensors_of_an_archive() -> None:
    look_into_config(entry(), "weight_", ())
    look_into_config(entry(tensor_meta={"sizes": [{"as_int": 0}, {"as_int": 9}]}), "weight_", {"weight_0"})
    look_into_config(graph({"config": None}), "weight_", ())


@pytest.mark.parametrize(
    ("changes", "empty", "said"),
    [
        ({"use_pickle": True}, (), "'conv.weight' as a pickled object"),
        ({"tensor_meta": None}, (), "'conv.weight' as a pickled object"),
        ({"path_name": "opaque_obj_0"}, (), "as an object of a class of its own, in 'opaque_obj_0'"),
        ({"path_name": None}, (), "as an object of a class of its own"),
        ({}, ("weight_0",), "'conv.weight' without its values"),
        ({"tensor_meta": {"sizes": []}}, ("weight_0",), "'conv.weight' without its values"),
    ],
)
def test_other_entries_of_an_archive_are_told(changes: dict[str, Any], empty: tuple[str, ...], said: str) -> None:
    with pytest.raises(UntrustedError) as caught:
        look_into_config(entry(**changes), "weight_", empty)
    assert said in str(caught.value)
