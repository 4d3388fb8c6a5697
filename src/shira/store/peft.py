# SPDX-License-Identifier: Apache-2.0
"""PEFT's format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

Each adapted module has two tensors, named ``<prefix><module>.shira_weight`` ``(k,)`` and
``<prefix><module>.shira_indices`` ``(2, k)``, row and column in the weight as it is stored; weights
of more than two dimensions count as matrices of ``shape[0]`` rows. A parameter that is no module's
``weight``, or that ``target_parameters`` names, has its own name in the place of the module's:
``...mlp.experts.down_proj.shira_weight``. The prefix is
``base_model.model.`` or nothing. All other tensors are whole tensors of the base model, by its own
names: modules that were trained whole (``modules_to_save``), saved embeddings.

It is read in two steps, since stock PEFT does not record the shapes of the weights: `read_peft`
checks all that can be known without them, `validate_against` and `to_adapter` the rest.

Stock PEFT casts what it loads to float32 values and int32 indices, so what is written may hold
bfloat16 and int16 and be half as large. It makes room for r (m + n) values in each weight before it
looks at the file, so it can load an adapter only if each weight has that many for the config's one
r.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from shira.adapter import Adapter
from shira.base import judge
from shira.delta import SparseDelta
from shira.errors import AdapterError, ConfigError, FileFormatError, WrongBaseError, did_you_mean
from shira.store.atomic import check_kind, write_atomically
from shira.store.config import (
    SHAPES_FIELD,
    TIED_FIELD,
    compose_config,
    parameters_of,
    read_config,
    target_parameters_in,
    with_tied_fingerprints,
)
from shira.store.header import (
    FLOATS,
    WHOLE_DTYPES,
    EntryError,
    Stored,
    TensorFile,
    check_values,
    check_whole,
    in_order,
    open_tensors,
    refusing,
    stored,
)
from shira.store.names import (
    CONFIG_NAME,
    INDICES,
    PEFT_PREFIX,
    VALUES,
    WEIGHTS_NAME,
    base_module_name,
    is_parameter,
    weight_name,
)
from shira.support import Support, matrix_shape

# How names of tensors begin that PEFT's tuners and wrappers add to a model.
_FOREIGN = (
    *("shira_", "lora_", "trainable_tokens", "token_adapter", "modules_to_save"),
    *("original_module", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "adalora_"),
)
_READ_INDICES = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "F32")
_WRITTEN_INDICES = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class RawDelta:
    """A file's entries for one module; all is checked but what needs the weight's shape."""

    values: Tensor  # (k,) floating point, finite, in the stored dtype
    coordinates: Tensor  # int32 (2, k), row and column, unique, in row-major order
    weight_name: str  # the base model's own name of the weight
    key: str  # the module's name in the file, prefix included
    index_dtype: str  # of the indices in the file, such as "I32"

    @property
    def nnz(self) -> int:
        """Entries (k)."""
        return self.values.numel()


@dataclass(frozen=True)
class PeftFile:
    """A file in PEFT's format, read and checked as far as it can be without the base.

    Attributes:
        path: The safetensors file.
        config: What ``adapter_config.json`` says; empty where there is none.
        tensors: By the base model's own name of each module.
        whole: Whole tensors, by the base model's own name of the parameter or buffer.
        copies: Copies of the base's weights that have a delta too, which PEFT saves beside adapted
            embeddings, by the weight's name.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, RawDelta]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the base weights by parameter name, if the config records them."""
        shapes = self.config.get(SHAPES_FIELD)
        return None if shapes is None else {name: tuple(sizes) for name, sizes in shapes.items()}

    @property
    def metadata(self) -> dict[str, Any]:
        """The adapter's metadata: the config without the shapes."""
        return {name: value for name, value in self.config.items() if name != SHAPES_FIELD}


def read_peft(path: str | os.PathLike[str]) -> PeftFile:
    """Read an adapter in PEFT's format; the shapes of the base weights need not be known.

    Args:
        path: The folder, or the safetensors file (whose config is read if it stands beside it under
            PEFT's names).

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If something in it is invalid; names file, tensor and cause.
    """
    weights, config_path = _locate(Path(path))
    config = read_config(config_path) if config_path else {}
    with open_tensors(weights) as file:
        pairs, others = _sort_out(file)
        if not pairs and config.get(SHAPES_FIELD) != {}:
            raise FileFormatError(
                f"{weights}: not a SHiRA adapter: none of its {len(others)} tensors is a {VALUES}"
            )
        tensors = {module: _read_delta(file, key, config) for module, key in pairs.items()}
        whole, copies = read_whole(file, others, {raw.weight_name for raw in tensors.values()})
    read = PeftFile(weights, config, tensors, whole, copies)
    _check_complete(read)
    return read


def validate_against(file: PeftFile, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check a file against the shapes of the base's weights, by parameter name.

    Raises:
        FileFormatError: If a target is not among them or a row or column is out of range.
        WrongBaseError: If the file records other shapes.
    """
    recorded = file.shapes or {}
    check_whole_shapes(file.path, {**file.whole, **file.copies}, shapes)
    for raw in file.tensors.values():
        name, where = raw.weight_name, f"{file.path}: tensor '{raw.key}"
        check_shape(f"{where}.{VALUES}'", name, recorded.get(name), shapes)
        sizes = matrix_shape(tuple(shapes[name]))
        for label, index, size in zip(("row", "column"), raw.coordinates, sizes, strict=True):
            if index.numel() and int(index.max()) >= size:
                raise FileFormatError(
                    f"{where}.{INDICES}': {label} {int(index.max())} is out of range: {name!r} of "
                    f"shape {tuple(shapes[name])} has {size} {label}s"
                )


def check_shape(
    where: str, name: str, made_for: tuple[int, ...] | None, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Check the shape of a weight, as far as a file tells it, against the base's.

    Raises:
        FileFormatError: If the base has no such weight; ``where`` begins the message.
        WrongBaseError: If it has another shape.
    """
    if name not in shapes:
        raise FileFormatError(
            f"{where}: unknown target: the base model has no parameter {name!r}."
            f"{did_you_mean(name, shapes)}"
        )
    if made_for not in (None, tuple(shapes[name])):
        raise WrongBaseError(
            f"{where}: wrong base: made for a {name!r} of shape {made_for}, but here it has "
            f"{tuple(shapes[name])}"
        )


def check_whole_shapes(
    path: Path, whole: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Check whole tensors as `check_shape` does, but for those whose shapes are not known."""
    for name, tensor in whole.items():
        if name in shapes:
            check_shape(f"{path}", name, tuple(tensor.shape), shapes)


def to_adapter(file: PeftFile, shapes: Mapping[str, Sequence[int]] | None = None) -> Adapter:
    """Return the adapter in a file; what its config says becomes metadata.

    Args:
        file: From `read_peft`.
        shapes: Of the base weights, by parameter name; may be left out if the file records them.

    Raises:
        FileFormatError: As `validate_against`, and if the shapes are not known.
        WrongBaseError: If the file records other shapes.
    """
    if shapes is None:
        shapes = file.shapes
    if shapes is None:
        raise FileFormatError(
            f"{file.path}: does not record the shapes of the base model's weights (stock PEFT's "
            "files never do). Pass the base: Adapter.load(path, base=model), or base= the path of "
            "its safetensors checkpoint, or {parameter name: shape}"
        )
    validate_against(file, shapes)
    deltas, whole = {}, dict(file.whole)
    for raw in file.tensors.values():
        name, shape = raw.weight_name, tuple(shapes[raw.weight_name])
        row, column = raw.coordinates
        flat = row.long().mul_(matrix_shape(shape)[1]).add_(column)
        delta = SparseDelta(Support._trusted(shape, flat), raw.values)
        if name in file.copies:
            held = file.copies[name].view(-1)[flat]
            verdict = judge(file.config, name, torch.ones(1), held)
            if verdict == "another":
                raise FileFormatError(
                    f"{file.path}: its copy of the base's {name!r} does not hold the values that "
                    "the adapter was trained on, as their fingerprint says; save the adapter again "
                    "with save_pretrained(..., save_embedding_layers=False)"
                )
            if verdict not in ("same", "same after rounding"):
                # Without a fingerprint nothing is known of the copy, and it has to come along.
                whole[name] = file.copies[name].clone()
                whole[name].view(-1)[flat] = delta.replacement(held)
                continue
        deltas[name] = delta
    for name, owner in (file.config.get(TIED_FIELD) or {}).items():
        if owner in deltas:
            deltas[name] = deltas[owner]
        else:
            whole[name] = whole[owner]
    return Adapter(deltas, with_tied_fingerprints(file.metadata), whole)


def read_whole(
    file: TensorFile, keys: Iterable[str], sparse: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read tensors of a PEFT file that no tuner has made, by the base model's own names.

    They are whole tensors, and copies of the base's weights that are among ``sparse``: those that
    the adapter changes otherwise.
    """
    whole: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key in keys:
        with refusing(file.path, f"tensor {key!r}"):
            parts, name = key.split("."), base_module_name(key)
            if any(part.startswith(_FOREIGN) for part in parts) or not all(parts):
                raise EntryError("not known: no SHiRA tensor and no tensor of a base model")
            if name in sparse and "base_layer" not in parts:
                raise EntryError(f"{name!r} has a delta in the file, and is there whole too")
            found = copies if name in sparse else whole
            if name in found:
                raise EntryError(f"duplicate: the file holds {name!r} twice")
            _check_dtype(file.tensors[key], WHOLE_DTYPES, "a whole tensor")
            found[name] = file.read(key)
            check_whole(found[name])
    return whole, copies


def _check_dtype(tensor: Stored, choices: Collection[str], what: str) -> None:
    if tensor.dtype not in choices:
        raise EntryError(f"dtype {tensor.dtype} is not one of {', '.join(choices)} ({what})")


def _locate(path: Path) -> tuple[Path, Path | None]:
    """Return the safetensors file and the config at ``path``."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))
    if not path.is_dir():
        config = path.with_name(CONFIG_NAME)
        return path, config if path.name == WEIGHTS_NAME and config.exists() else None
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (path / name).exists():
            pickled = " (its adapter_model.bin is a pickle, which can run code and is not read)"
            there = name == WEIGHTS_NAME and (path / "adapter_model.bin").exists()
            raise FileFormatError(
                f"{path}: not an adapter: there is no {name}{pickled if there else ''}"
            )
    return path / WEIGHTS_NAME, path / CONFIG_NAME


def _sort_out(file: TensorFile) -> tuple[dict[str, str], list[str]]:
    """Return the key of each adapted module, and the tensors that are not SHiRA's."""
    keys: dict[str, str] = {}
    others = []
    for name in file.tensors:
        key, _, kind = name.rpartition(".")
        if kind not in (VALUES, INDICES):
            others.append(name)
            continue
        twin = f"{key}.{INDICES if kind == VALUES else VALUES}"
        module = base_module_name(key)
        with refusing(file.path, f"tensor {name!r}"):
            if twin not in file.tensors:
                raise EntryError(f"missing {twin!r}: values and indices come in pairs")
            if not all(module.split(".")):
                raise EntryError("an empty module name")
            if keys.setdefault(module, key) != key:
                raise EntryError(f"duplicate: {keys[module]!r} is for the same module")
    return keys, others


def _read_delta(file: TensorFile, key: str, config: Mapping[str, Any]) -> RawDelta:
    names = f"{key}.{VALUES}", f"{key}.{INDICES}"
    of_values, of_indices = (file.tensors[name] for name in names)
    with refusing(file.path, f"tensor {names[0]!r}"):
        _check_dtype(of_values, FLOATS, "floating point")
        if len(of_values.shape) != 1:
            raise EntryError(f"shape {of_values.shape} is not (k,)")
        values = file.read(names[0])
        check_values(values)
    with refusing(file.path, f"tensor {names[1]!r}"):
        k = len(values)
        _check_dtype(of_indices, _READ_INDICES, "integers")
        if of_indices.shape != (2, k):
            raise EntryError(f"shape {of_indices.shape} is not (2, {k}), as {k} values need")
        coordinates, values = in_order(file.read(names[1]), values)
    weight = base_module_name(key)
    known = weight in (config.get(SHAPES_FIELD) or ())
    if not known and not is_parameter(weight, target_parameters_in(config)):
        weight = weight_name(weight)
    return RawDelta(values, coordinates, weight, key, of_indices.dtype)


def _check_complete(file: PeftFile) -> None:
    """Check that the modules are those that the config lists in ``shira_shapes``, if it does."""
    present = {raw.weight_name: raw.key for raw in file.tensors.values()}
    recorded = present if file.shapes is None else file.shapes
    for name in recorded:
        if name not in present:
            raise FileFormatError(
                f"{file.path}: missing tensor: {CONFIG_NAME} lists {name!r}, but there is no "
                f"{VALUES} for it.{did_you_mean(name, present)}"
            )
    for name, key in present.items():
        if name not in recorded:
            raise FileFormatError(
                f"{file.path}: tensor '{key}.{VALUES}': unknown target: {CONFIG_NAME} does not "
                f"list {name!r}.{did_you_mean(name, recorded)}"
            )
    for name, owner in (file.config.get(TIED_FIELD) or {}).items():
        if owner not in present or name in present or name in file.whole:
            raise FileFormatError(
                f"{file.path}: {CONFIG_NAME} says in {TIED_FIELD} that {name!r} is one weight with "
                f"{owner!r}, but the file has "
                f"{'no entries of it' if owner not in present else 'both'}"
            )


def write_peft(
    adapter: Adapter,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    indices_dtype: torch.dtype | None = None,
) -> None:
    """Write an adapter in PEFT's format; nothing is written if anything is wrong with it.

    Each of the two files is replaced as a whole, the weights first.

    Args:
        adapter: What to write. Its metadata are the fields of the config.
        path: A folder, made if absent.
        dtype: Dtype of the stored values; ``None`` keeps theirs. Whole tensors keep theirs always.
        config: Fields that go before the metadata's.
        indices_dtype: ``torch.int16``, ``int32`` or ``int64``; ``None`` takes int16 for each weight
            with at most 32768 rows and columns, else int32. PEFT reads any of them.

    Raises:
        ConfigError: If a dtype is not one of the format's, the path is a file, or a field of the
            config cannot be written.
        AdapterError: If a parameter is of no module, a value is not finite in ``dtype``,
            a whole tensor has a dtype that models do not keep, or a row or column does not fit
            ``indices_dtype``.
    """
    folder = Path(path)
    check_kind(folder, folder=True)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        check_kind(folder / name)
    for what, given, choices in (
        ("dtype", dtype, (*FLOATS.values(), None)),
        ("indices_dtype", indices_dtype, (*_WRITTEN_INDICES, None)),
    ):
        if given not in choices:
            raise ConfigError(f"{what} is one of {', '.join(map(str, choices[:-1]))}, not {given}")
    fields = {**adapter.metadata, **(config or {})}
    tied = {
        name: owner
        for name, owner in (fields.pop(TIED_FIELD, None) or {}).items()
        if name in adapter and owner in adapter and adapter[name] == adapter[owner]
    }
    if tied:
        fields |= {TIED_FIELD: tied, "ensure_weight_tying": True}
        once = {name: delta for name, delta in adapter.items() if name not in tied}
        adapter = Adapter(once, adapter.metadata, adapter.tensors)
    text = compose_config(adapter, fields)
    tensors: dict[str, Tensor] = {}
    parameters = parameters_of(adapter, fields.get("target_parameters"))
    for name, delta in adapter.items():
        module = name.rpartition(".")[0]
        if not module:
            raise AdapterError(f"PEFT's format names modules, and {name!r} is a parameter of none")
        key = PEFT_PREFIX + (name if name in parameters else module)
        if f"{key}.{VALUES}" in tensors:
            raise AdapterError(f"{name!r} would have the name in the file that another has too")
        values = stored(name, delta.values, dtype, tuple(FLOATS.values()))
        tensors[f"{key}.{VALUES}"] = values.clone()  # none may share memory
        tensors[f"{key}.{INDICES}"] = _stored_indices(name, delta, indices_dtype)
    if fields.get("modules_to_save") and not adapter.tensors:
        warnings.warn(
            f"{folder}: modules_to_save ({', '.join(map(str, fields['modules_to_save']))}) stand "
            "in the adapter's metadata, but it holds no whole tensors, and this file neither",
            stacklevel=2,
        )
    for name, tensor in adapter.tensors.items():
        tensors[PEFT_PREFIX + name] = stored(name, tensor).clone()
    raw = to_bytes(tensors, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_NAME, raw)
    write_atomically(folder / CONFIG_NAME, text.encode())


def _stored_indices(name: str, delta: SparseDelta, dtype: torch.dtype | None) -> Tensor:
    largest = max(matrix_shape(delta.support.shape))
    if dtype is None:
        dtype = torch.int16 if largest <= 2**15 else torch.int32
    if largest - 1 > torch.iinfo(dtype).max:
        raise AdapterError(
            f"{name!r} of shape {delta.support.shape} has rows or columns beyond {dtype}"
        )
    return delta.support.coordinates().to("cpu", dtype)
