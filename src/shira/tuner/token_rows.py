# SPDX-License-Identifier: Apache-2.0
"""``trainable_token_indices``: rows of an embedding that are trained whole, as PEFT's LoRA has it.

PEFT clones the whole table in each forward, and writes the trained rows into the clone. Here the
rows are entries of the weight like any others: a support of ``len(tokens) * dim`` entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shira.errors import ConfigError, TargetError, did_you_mean
from shira.store.names import full_shape
from shira.support import Support
from shira.tuner.base_layer import base_of, weight_of


def checked_tokens(given: Any) -> list[int] | dict[str, list[int]] | None:
    """Return ``trainable_token_indices`` as lists; `ConfigError` if that is not what is given."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        if not given:
            raise ConfigError("trainable_token_indices names no embedding; None trains no tokens")
        return {str(name): _checked(rows, f"[{str(name)!r}]") for name, rows in given.items()}
    return _checked(given, "")


def _checked(rows: Any, where: str) -> list[int]:
    plain = isinstance(rows, (list, tuple, set, range)) and all(
        isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in rows
    )
    if not plain or not rows:
        raise ConfigError(
            f"trainable_token_indices{where} is a list of token numbers, from 0, not {rows!r:.100}"
        )
    return sorted(rows) if isinstance(rows, set) else list(rows)


def token_rows(given: Any, model: nn.Module) -> dict[str, list[int]]:
    """Return ``{module: rows to train}``, the rows sorted, by the names that modules have here.

    Raises:
        TargetError: If there is no such embedding, or a row is beyond its last.
    """
    if given is None:
        return {}
    modules = dict(model.named_modules())
    if isinstance(given, Mapping):
        wanted = {name: (rows, _named(name, modules)) for name, rows in given.items()}
    else:
        found = _input_embedding(model)
        named = [name for name, module in modules.items() if module is found]
        wanted = {"embed_tokens": (given, named[:1] or _named("embed_tokens", modules))}
    result: dict[str, list[int]] = {}
    for key, (rows, names) in wanted.items():
        if not names:
            raise TargetError(
                f"trainable_token_indices: the model has no module {key!r}."
                f"{did_you_mean(key, modules)} Name the embedding: "
                "trainable_token_indices={'embed_tokens': [...]}"
            )
        for name in names:
            base = base_of(modules[name])
            if not isinstance(base, (nn.Embedding, nn.Linear)):
                raise TargetError(
                    f"trainable_token_indices: {name!r} ({type(base).__name__}) has no rows of "
                    "tokens; it is for an embedding, or a linear head"
                )
            count = full_shape(weight_of(base))[0]
            if max(rows) >= count:
                raise TargetError(
                    f"trainable_token_indices: token {max(rows)} is beyond the {count} rows of "
                    f"{name!r}; call model.resize_token_embeddings(len(tokenizer)) first"
                )
            result[name] = sorted({*result.get(name, []), *rows})
    return result


def support_of_rows(shape: Sequence[int], rows: Sequence[int]) -> Support:
    """Return all entries of some rows, sorted and unique, of a weight ``[rows, dim]``."""
    rows_, dim = torch.tensor(rows), int(shape[1])
    return Support(tuple(shape), (rows_[:, None] * dim + torch.arange(dim)).flatten())


def _named(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [path for path in modules if path == name or path.endswith(f".{name}")]


def _input_embedding(model: nn.Module) -> nn.Module | None:
    try:
        found: nn.Module | None = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found
