# SPDX-License-Identifier: Apache-2.0
"""Files exchanged with PEFT's own SHiRA, which runs in processes that never import shira."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shira.adapter import Adapter
from shira.delta import SparseDelta
from shira.store import read_peft, write_peft
from shira.support import Support
from tests.forked import program

pytest.importorskip("peft")
SCRIPT = Path(__file__).with_name("stock_peft.py")


def stock(*args: object) -> None:
    program(SCRIPT.read_text(), *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock")
    stock("write", path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "expected.safetensors")


def dense(delta: SparseDelta) -> Tensor:
    made = torch.zeros(delta.support.numel)
    made[delta.support.indices.long()] = delta.values.float()
    return made.view(delta.support.shape)


def run(base: dict[str, Tensor], adapter: Adapter, x: Tensor) -> Tensor:
    """The little model of `stock_peft`, its weights with the adapter's deltas."""
    weights = {name: w + dense(adapter[name]) if name in adapter else w for name, w in base.items()}
    weights |= adapter.tensors
    for layer in ("0", "2", "3"):
        x = nn.functional.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        x = x.tanh() if layer == "0" else x
    return x


def test_we_read_what_peft_writes(folder: Path, expected: dict[str, Tensor]) -> None:
    file = read_peft(folder / "adapter")
    assert file.shapes is None
    assert file.config["r"] == 2
    assert file.tensors["0"].index_dtype in ("I32", "F32")
    base = load_file(folder / "base.safetensors")
    assert file.whole.keys() == {"3.weight", "3.bias"}
    assert torch.equal(file.whole["3.weight"], 2 * base["3.weight"])
    assert torch.equal(file.whole["3.bias"], base["3.bias"])
    adapter = Adapter.load(folder / "adapter", base=folder / "base.safetensors")
    assert {name: delta.nnz for name, delta in adapter.items()} == {
        "0.weight": 2 * (12 + 20),
        "2.weight": 2 * (20 + 9),
    }
    for name, delta in adapter.items():
        assert torch.equal(dense(delta), expected[name])
    assert adapter.tensors.keys() == file.whole.keys()
    assert torch.allclose(run(base, adapter, expected["x"]), expected["y"], atol=1e-6)


def test_peft_loads_what_we_write(folder: Path, expected: dict[str, Tensor]) -> None:
    """int16 indices and values in bfloat16, on supports that PEFT did not draw."""
    base = load_file(folder / "base.safetensors")
    generator = torch.Generator().manual_seed(1)
    deltas = {}
    for name, r in (("0.weight", 3), ("2.weight", 3)):
        shape = tuple(base[name].shape)
        k = r * sum(shape)
        chosen = torch.randperm(base[name].numel(), generator=generator)[:k]
        values = torch.randn(k, generator=generator).bfloat16()
        deltas[name] = SparseDelta(Support.from_unsorted(shape, chosen), values)
    adapter = Adapter(deltas, {"mask_type": "magnitude", "density": 0.4, "random_seed": 9})
    ours = folder / "ours"
    adapter.tensors |= {"3.weight": torch.randn(4, 9), "3.bias": torch.ones(4)}
    write_peft(adapter, ours)
    stored = load_file(ours / "adapter_model.safetensors")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(stored.pop(f"base_model.model.{name}"), tensor)
    assert {tensor.dtype for tensor in stored.values()} == {torch.int16, torch.bfloat16}
    out = folder / "out.safetensors"
    stock("load", folder, ours, out)
    y = load_file(out)["y"]
    assert torch.allclose(y, run(base, adapter, expected["x"]), atol=1e-6)
    assert not torch.allclose(y, expected["y"], atol=1e-2)


def test_a_file_of_pefts_comes_back_to_it(folder: Path, expected: dict[str, Tensor]) -> None:
    """PEFT writes, we read and write, PEFT loads: the same outputs, bit for bit."""
    adapter = Adapter.load(folder / "adapter", base=folder / "base.safetensors")
    adapter.save(folder / "again", "peft")
    stock("load", folder, folder / "again", folder / "again.safetensors")
    assert torch.equal(load_file(folder / "again.safetensors")["y"], expected["y"])
