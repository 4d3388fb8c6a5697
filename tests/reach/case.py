# SPDX-License-Identifier: Apache-2.0
"""One row of the table "where LoRA works, does SHiRA?": a case, and what is asked of it.

Each question is a small function, in the order of the columns. It returns if the answer is yes, and
raises otherwise: a `ShiraError` is *refused*, an `AssertionError` *WRONG*, anything else *FAILS*.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from shira import Adapter, ShiraConfig, Switch
from shira.errors import ConfigError, ShiraError
from shira.store.names import base_module_name
from tests.reach.serving import first_sentence

STEPS = 12


@dataclass(frozen=True)
class Case:
    """What a row is made of."""

    build: Callable[[], nn.Module]
    """Makes the base model; called with the same seed each time."""
    call: Callable[[nn.Module], Tensor]
    """Computes something with a model, adapted or not: logits, features."""
    targets: dict[str, Any]
    """Options of both configurations: ``{"target_modules": ["q_proj"]}``."""
    shira: dict[str, Any] = field(default_factory=dict)
    """Further options of SHiRA's configuration."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Further options of LoRA's configuration."""
    train: Callable[[nn.Module, Callable[[], Tensor]], None] | None = None
    """Trains a model, given a function that computes the loss; without it, `STEPS` of AdamW."""
    exact: bool = True
    """Whether merged and unmerged models compute bit for bit the same, not within rounding."""
    merges: bool = True
    """Whether the base weight can be merged into and switched at all."""


class Row(NamedTuple):
    """A row of the table."""

    section: str
    name: str
    case: Callable[[], Case]
    needs: tuple[str, ...]
    """Packages without which it cannot be run."""

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


ROWS: list[Row] = []


def row(section: str, name: str, *needs: str) -> Callable[[Callable[[], Case]], Any]:
    """Put what makes a case into the table."""

    def add(make: Callable[[], Case]) -> Callable[[], Case]:
        ROWS.append(Row(section, name, make, needs))
        return make

    return add


# ------------------------------------------------------------------------------------ the questions


def lora(case: Case, folder: Path) -> None:
    """Ask PEFT's LoRA: does it train, save and load?"""
    config = LoraConfig(r=2, **case.targets, **case.lora)
    model = get_peft_model(fresh(case), config)
    train(case, model)
    model.eval().save_pretrained(folder / "lora")
    PeftModel.from_pretrained(fresh(case), folder / "lora")


def trains(case: Case, folder: Path) -> nn.Module:
    """Train an adapter: the loss falls, and the base keeps its bits."""
    base = fresh(case)
    before = weights(base)
    options = {"r": 2, "random_seed": 0, **case.targets, **case.shira}
    try:
        config = ShiraConfig(**options)
    except TypeError as error:  # there is no such option
        raise ConfigError(str(error)) from error
    model = get_peft_model(base, config)
    first, last = train(case, model)
    assert last < first, f"the loss went from {first:.4g} to {last:.4g}"
    assert same(weights(model), before), "training changed the base"
    return model.eval()


def saves(case: Case, folder: Path, model: nn.Module) -> None:
    """Save it: the file holds what was trained."""
    model.save_pretrained(folder / "adapter")
    adapter = Adapter.load(folder / "adapter")
    assert adapter.nnz or adapter.tensors
    assert adapter == Adapter.from_model(model)


def loads(case: Case, folder: Path, model: nn.Module) -> None:
    """Load it into a fresh model: the outputs of the trained one, bit for bit."""
    loaded = PeftModel.from_pretrained(fresh(case), folder / "adapter").eval()
    assert torch.equal(output(case, loaded), output(case, model)), "another output when loaded"


def switches(case: Case, folder: Path, model: nn.Module) -> None:
    """Switch it on and off in a bare model: the merged model's outputs, and the base's bits."""
    bare = fresh(case).eval().requires_grad_(False)
    before, plain = weights(bare), output(case, bare)
    switch = Switch(bare)
    switch.load("adapter", folder / "adapter")
    for _ in range(3):
        switch.activate("adapter")
        near(case, output(case, bare), output(case, model), "switched on")
        switch.deactivate()
    assert same(weights(bare), before), "switching changed the base"
    assert torch.equal(output(case, bare), plain)


def merges(case: Case, folder: Path, model: nn.Module) -> None:
    """Merge it and take it out again: the same outputs, and the base's bits."""
    before, adapted = weights(model), output(case, model)
    model.merge_adapter()
    near(case, output(case, model), adapted, "merged")
    model.unmerge_adapter()
    assert same(weights(model), before), "merging changed the base"
    assert torch.equal(output(case, model), adapted)
    near(case, output(case, model.merge_and_unload()), adapted, "merged and unloaded")


QUESTIONS: dict[str, Callable[..., Any]] = {
    "train": trains,
    "save": saves,
    "load": loads,
    "switch": switches,
    "merge": merges,
}


class Answer(NamedTuple):
    """The line of the table."""

    cells: dict[str, str]
    """LoRA's, and by column."""
    note: str


def ask(case: Case, folder: Path) -> Answer:
    """Ask all questions of a case."""
    cells, notes = {}, []

    def answer(column: str, question: Callable[..., Any], *more: Any) -> Any:
        try:
            result = question(case, folder, *more)
        except Exception as error:
            notes.append(f"{column}: {first_sentence(str(error))}")
            cells[column] = _word(column, error)
            return None
        cells[column] = "yes"
        return result

    answer("LoRA", lora)
    model = answer("train", trains)
    for column in list(QUESTIONS)[1:]:
        packed = not case.merges and column in ("switch", "merge")
        if model is None or packed or cells.get("save", "yes") != "yes":
            cells[column] = "-"
        else:
            answer(column, QUESTIONS[column], model)
    return Answer(cells, "; ".join(notes))


def _word(column: str, error: Exception) -> str:
    if column == "LoRA":
        return "no"
    if isinstance(error, ShiraError):
        return "refused"
    return "WRONG" if isinstance(error, AssertionError) else "FAILS"


# ---------------------------------------------------------------------------------------- helpers


def fresh(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def train(case: Case, model: nn.Module) -> tuple[float, float]:
    """Train, and return the loss before and after."""
    torch.manual_seed(1)
    wanted = torch.randn_like(output(case, model.eval()), dtype=torch.float32)

    def loss() -> Tensor:
        return (case.call(model).float() - wanted).square().mean()

    with torch.no_grad():
        first = float(loss())
    model.train()
    if case.train is not None:
        case.train(model, loss)
    else:
        optimizer = torch.optim.AdamW(trained(model), lr=3e-2)
        for _ in range(STEPS):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return first, float(loss())


def trained(model: nn.Module) -> list[Tensor]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def output(case: Case, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return case.call(model).detach().clone()


def near(case: Case, got: Tensor, wanted: Tensor, what: str) -> None:
    if case.exact:
        assert torch.equal(got, wanted), f"another output {what}"
    else:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=lambda m: f"{what}: {m}")


_NEW = ("shira_", "modules_to_save", "token_adapter", "trainable_tokens_")
"""What parts of the names of an adapter's own tensors begin with."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the base's tensors, by its own names; unpacked, where they can be."""
    state = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not any(part.startswith(_NEW) for part in name.split(".")):
            name = base_module_name(name).replace(".original_module.", ".")
            packed = type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "dequantize")
            state[name] = tensor.dequantize() if packed else tensor.detach().clone()
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
