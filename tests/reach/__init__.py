# SPDX-License-Identifier: Apache-2.0
"""The table "where LoRA works, does SHiRA?", made by running each of its rows.

A row is one function, which returns a `case.Case`, under ``@row(section, name, *packages)`` in
``layers.py``, ``bases.py``, ``trainers.py`` or a file of its own that ``page.py`` imports:

    @row("Layers and parameters", "`nn.Linear`")
    def linear() -> Case:
        x = torch.randn(16, 8)
        return Case(MLP, lambda model: model(x), {"target_modules": ["lin1"]})

``python -m tests.reach nn.Linear`` runs the rows of that name and writes ``docs/reach.md``.
"""
