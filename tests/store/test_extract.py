# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.errors import AdapterError, UnknownAdapterError
from shira.store.extract import adapter_of_model
from tests.forked import program


class Layer(nn.Module):
    """The least that counts as a SHiRA layer."""

    def __init__(self, base: nn.Module, **adapters: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.base_layer = base
        self.shira_weight = nn.ParameterDict(
            {name: nn.Parameter(values.clone()) for name, (values, _) in adapters.items()}
        )
        self.shira_indices = {name: indices.clone() for name, (_, indices) in adapters.items()}

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


class Kind(str, Enum):
    SHIRA = "SHIRA"


class Config:
    def to_dict(self) -> dict[str, Any]:
        return {
            "peft_type": Kind.SHIRA,
            "target_modules": {"b", "a"},
            "nested": {Kind.SHIRA: (1, Path("x"))},
            "dtype": torch.bfloat16,
            "r": 2,
            "shira_shapes": {"stale.weight": [1]},
        }


class Peft(nn.Module):
    """The nesting of a PeftModel: ``base_model.model.<the base>``."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = base
        self.peft_config = {"default": Config()}


VALUES = torch.tensor([1.0, 2.0, 3.0])
INDICES = torch.tensor([[1, 0, 1], [0, 2, 1]], dtype=torch.int32)  # unsorted on purpose


def base() -> nn.Sequential:
    return nn.Sequential(
        Layer(nn.Linear(3, 2), default=(VALUES, INDICES), style=(VALUES, INDICES)),
        nn.Sequential(Layer(nn.Conv2d(3, 2, 1), default=(VALUES.bfloat16(), INDICES))),
        Layer(nn.Linear(3, 2), style=(VALUES, INDICES)),
    )


WRAPPERS = {
    "bare": lambda: base(),
    "peft": lambda: Peft(base()),
    "compiled_inside": lambda: Peft(torch.compile(base())),  # type: ignore[arg-type]
    "compiled_outside": lambda: torch.compile(Peft(base())),
    "data_parallel": lambda: nn.DataParallel(Peft(base())),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_entries(wrapper: str) -> None:
    adapter = adapter_of_model(WRAPPERS[wrapper]())
    assert list(adapter) == ["0.weight", "1.0.weight"]
    assert adapter["0.weight"].support.shape == (2, 3)
    assert adapter["1.0.weight"].support.shape == (2, 3, 1, 1)
    assert adapter["1.0.weight"].values.dtype == torch.bfloat16
    for delta in adapter.values():
        assert delta.support.indices.tolist() == [2, 3, 4]
        assert delta.values.tolist() == [2.0, 1.0, 3.0]


@pytest.mark.parametrize("in_order", [False, True])
def test_the_values_are_copies(in_order: bool) -> None:
    model = base()
    if in_order:
        order = torch.tensor([1, 0, 2])
        model[2] = Layer(nn.Linear(3, 2), style=(VALUES[order], INDICES[:, order]))
    adapter = Adapter.from_model(model, "style")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model[2].shira_indices["style"].zero_()
    assert list(adapter) == ["0.weight", "2.weight"]
    assert adapter["2.weight"].values.tolist() == [2.0, 1.0, 3.0]
    assert adapter["2.weight"].support.indices.tolist() == [2, 3, 4]
    assert not adapter["2.weight"].values.requires_grad


def test_metadata_is_the_config_in_plain_values() -> None:
    metadata = adapter_of_model(Peft(base())).metadata
    assert json.loads(json.dumps(metadata)) == {
        "peft_type": "SHIRA",
        "target_modules": ["a", "b"],
        "nested": {"SHIRA": [1, "x"]},
        "dtype": "bfloat16",
        "r": 2,
    }
    assert adapter_of_model(base()).metadata == {}


@pytest.mark.parametrize("field", [{(1, 2): 3}, {Kind: 1}, {torch.float16: 1}])
def test_a_config_that_no_file_can_hold_is_refused(field: Any) -> None:
    model = Peft(base())
    model.peft_config["default"].to_dict = lambda: {"nested": field}  # type: ignore[method-assign]
    with pytest.raises(AdapterError, match="config of adapter 'default' cannot be written as JSON"):
        adapter_of_model(model)


def test_values_on_the_meta_device_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"'0\.weight': adapter 'default': .*meta"):
        adapter_of_model(base().to("meta"))


class Wrapper(nn.Module):
    """A module that PEFT lets adapters train whole: nested as ``ModulesToSaveWrapper`` does."""

    def __init__(self, **copies: nn.Module) -> None:
        super().__init__()
        self.original_module = nn.BatchNorm1d(2)
        self.modules_to_save = nn.ModuleDict(copies)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_modules_that_are_trained_whole(wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(5, 2))
    head = Wrapper(default=norm, other=nn.BatchNorm1d(2))
    monkeypatch.setitem(globals(), "base", lambda made=base: made().append(head))
    model = WRAPPERS[wrapper]()
    adapter = adapter_of_model(model)
    assert len(adapter) == 2
    assert adapter.tensors.keys() == {f"3.{name}" for name in norm.state_dict()}
    assert all(torch.equal(adapter.tensors[f"3.{n}"], t) for n, t in norm.state_dict().items())
    norm.running_mean.zero_()
    assert adapter.tensors["3.running_mean"].any()
    assert adapter_of_model(model, "style").tensors == {}


def test_layers_inside_a_module_that_is_trained_whole_are_refused() -> None:
    inside = Layer(nn.Linear(3, 2), default=(VALUES, INDICES))
    model = nn.Sequential(base(), Wrapper(default=nn.Sequential(inside)))
    with pytest.raises(AdapterError, match=r"'1' is trained whole .* has SHiRA layers inside"):
        adapter_of_model(model)


def test_unknown_names() -> None:
    with pytest.raises(UnknownAdapterError, match=r"'styel'.*'default', 'style'.*mean 'style'"):
        adapter_of_model(base(), "styel")
    with pytest.raises(UnknownAdapterError, match="no SHiRA layers"):
        adapter_of_model(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        (torch.tensor([[0, 0, 5], [0, 1, 0]]), r"'0\.weight'.*'x'.*row 5"),
        (torch.tensor([[0, 0, 0], [0, 1, 1]]), "duplicate"),
        (torch.tensor([[0, 0, -1], [0, 1, 1]]), "negative"),
        (torch.tensor([[0, 0], [0, 1]]), r"\(2,\)"),
    ],
)
def test_impossible_entries_are_refused(indices: Tensor, match: str) -> None:
    model = nn.Sequential(Layer(nn.Linear(3, 2), x=(VALUES, indices)))
    with pytest.raises(AdapterError, match=match):
        adapter_of_model(model, "x")


def test_a_layer_without_indices_is_refused() -> None:
    layer = Layer(nn.Linear(3, 2), x=(VALUES, INDICES))
    layer.shira_indices.clear()
    with pytest.raises(AdapterError, match="no indices"):
        adapter_of_model(nn.Sequential(layer), "x")


def test_packed_weights_have_their_full_shape() -> None:
    layer = Layer(nn.Linear(1, 3, bias=False), x=(VALUES, INDICES))

    class State:
        shape = torch.Size((2, 3))

    layer.base_layer.weight.quant_state = State()  # as bitsandbytes keeps it
    assert adapter_of_model(nn.Sequential(layer), "x")["0.weight"].support.shape == (2, 3)


STOCK = """
import sys
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn
from shira.adapter import Adapter
torch.set_num_threads(1)
base = nn.Sequential(nn.Linear(12, 20), nn.Sequential(nn.Linear(20, 9)))
config = ShiraConfig(r=2, target_modules=r"0", random_seed=5, init_weights=False)
model = get_peft_model(base, config)
model.add_adapter("other", ShiraConfig(r=1, target_modules=["1.0"], init_weights=False))
model.save_pretrained(sys.argv[1])
expected = Adapter.load(sys.argv[1], base=model)
assert "shira.tuner" not in sys.modules
for at in (model, model.base_model, model.base_model.model):
    got = Adapter.from_model(at)
    assert got == expected, (got, expected)
print(*got, *Adapter.from_model(model, "other"), got.metadata["peft_type"], got.nnz)
"""


def test_a_model_of_stock_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert program(STOCK, tmp_path).split() == ["0.weight", "1.0.weight", "SHIRA", "64"]
