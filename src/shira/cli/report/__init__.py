# SPDX-License-Identifier: Apache-2.0
"""`shira report`: everything that can be seen of adapters, as one page.

``gather`` reads adapters and measures them, ``charts`` draws, and ``page.html`` is the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shira.cli import options
from shira.cli.output import megabytes, percent, some, write
from shira.errors import ConfigError, MissingDependencyError, shown

if TYPE_CHECKING:
    from shira.checkpoints import Checkpoint
    from shira.cli.report.gather import Described
    from shira.measure import Overlap

EXAMPLES = (
    "shira report adapter",
    "shira report adapter --base ./my-model -o adapter.html",
    "shira report poems code law -o three.html",
    "shira report poems code --fast",
)
_MATRICES = {
    "jaccard": "Shared entries over entries of either: 0 is none in common, 1 the same entries.",
    "cosine": "Of the angle between the deltas: 0 is unrelated, 1 the same way, -1 the opposite.",
    "conflicts": "Share of the shared entries whose signs differ, so that one undoes the other.",
}


def command(
    adapters: Annotated[
        list[Path], typer.Argument(help="The adapters: folders or files.", metavar="ADAPTER...")
    ],
    output: Annotated[Path, options.output("The page to write.")] = Path("report.html"),
    base: Annotated[
        str | None,
        options.base(
            "Tells how many deltas bfloat16 loses, and the shapes of weights where an adapter does "
            "not record them."
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Leave out ranks, AWOM and AWOR, which take the longer time."),
    ] = False,
    check_base: options.CheckSameBase = True,
    seed: options.Seed = 0,
) -> None:
    """Write one HTML page that shows adapters.

    In short what each is, how large, what it changes and whether it clashes with the others; then
    values, ranks, where in each weight the entries are, deltas that bfloat16 loses (with --base),
    and the training curve if metrics.json of shira train or trainer_state.json lies beside an
    adapter. The page holds all it needs: it opens without a network, on a phone or a desktop, light
    or dark.

    Exit status 2: an adapter cannot be read, or the adapters do not belong together.
    """
    from shira.checkpoints import open_checkpoint

    checkpoint = None if base is None else open_checkpoint(base)
    write_report(adapters, output, checkpoint, fast=fast, seed=seed, check_base=check_base)
    write(f"{output}: {len(adapters)} adapter{'s' if len(adapters) > 1 else ''}")


def write_report(
    paths: Sequence[Path],
    output: Path,
    base: Checkpoint | None = None,
    *,
    fast: bool = False,
    seed: int = 0,
    check_base: bool = True,
) -> None:
    """Write the page of some adapters; whatever goes wrong, an old page stays as it was.

    Options are those of the command. Whatever can be told before adapters are read is: an output
    that is an input or that lies nowhere, jinja2 or matplotlib that is missing.
    """
    from shira.cli.report.gather import LOGS, gather, log_folder
    from shira.store.atomic import check_outputs, write_atomically

    logs = [log_folder(path) / name for path in paths for name in LOGS]
    check_outputs({"--output": output}, [*paths, *logs], [base.path if base else None])
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}")
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; name a file in it")
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise MissingDependencyError(f"shira report needs {package}: pip install {package}")
    found = gather(paths, base, fast=fast, seed=seed, check_base=check_base)
    write_atomically(output, page(*found).encode())


def page(adapters: Sequence[Described], pairs: Sequence[Overlap]) -> str:
    """Return the HTML document; the same adapters give the same text."""
    from shira._version import __version__
    from shira.cli.report.charts import charts
    from shira.cli.several import matrix
    from shira.measure.figures import FIGURE_NAMES, cells

    names = [described.name for described in adapters]
    text: str = template().render(
        adapters=adapters,
        pairs=pairs,
        names=names,
        in_short=_in_short,
        charts=charts,
        weights=_weights,
        cells=cells,
        figure_names=list(FIGURE_NAMES),
        matrices={figure: matrix(names, pairs, figure) for figure in _MATRICES},
        about=_MATRICES,
        maps=[made for described in adapters for made in described.maps],
        version=__version__,
    )
    return text


def template(source: str | None = None) -> Any:
    """Return a template, of the page by default, in which every text is escaped."""
    import base64
    import hashlib
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def finalize(value: object) -> object:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return shown(value, lines=True) if plain else value

    def sha256(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

    made = Environment(autoescape=True, undefined=StrictUndefined, finalize=finalize)
    made.filters["sha256"] = sha256
    if source is None:
        source = (files("shira.cli.report") / "page.html").read_text(encoding="utf-8")
    return made.from_string(source)


def _in_short(described: Described, pairs: Sequence[Overlap]) -> Iterator[tuple[str, str]]:
    """Yield what a person wants to know first: question and answer."""
    from shira.cli.summary import BASE_FIELD

    summary, every = described.summary, described.summary.all
    base = summary.metadata.get(BASE_FIELD)
    kind = f"A sparse adapter of {base}" if base else "A sparse adapter; its base is not recorded"
    yield "What is it?", f"{kind}. Mask: {summary.mask}."
    size = f"{every.nnz:,} entries in {len(summary.targets)} weights"
    if summary.density is not None:
        size += f", {summary.density:.2%} of these weights"
    yield "How large is it?", f"{size}; {megabytes(summary.file_bytes)} on disk."
    change = "No single entries."
    if every.nnz:
        mean, most, zeros = every.figures.mean_abs, every.figures.largest, every.figures.zeros
        change = f"Its entries by {mean:.3g} on average, at most {most:.3g}"
        strongest = max(summary.targets, key=lambda target: target.figures.mean_abs or 0.0)
        change += f", most in {strongest.name}" if len(summary.targets) > 1 else ""
        change += f"; {zeros:,} entries stay as they are" if zeros else ""
        change += ". All other entries of the model are the base's."
    if summary.whole:
        change += f" It also replaces {len(summary.whole)} tensors as a whole."
    yield "What does it change?", change
    for pair in pairs:
        if described.name in (pair.a, pair.b):
            other = pair.b if pair.a == described.name else pair.a
            mine = pair.nnz_a if pair.a == described.name else pair.nnz_b
            unlike = [name for name, state in pair.whole.items() if state == "different"]
            clash = f"Not with {other}: they share no entry."
            if unlike:
                clash = f"With {other} it shares no entry."
            if pair.shared:
                clash = (
                    f"With {other} it shares {pair.shared:,} entries, "
                    f"{percent(pair.shared, mine)} of its own; at {pair.sign_conflicts:,} of them "
                    "the signs differ."
                )
            if unlike:
                clash += f" Each replaces {some(unlike)} by a tensor of its own."
            yield "Does it clash?", clash


def _weights(described: Described) -> tuple[list[str], list[list[str]]]:
    """Return the columns of the table of weights, and a row for each weight."""
    rows = []
    for target in described.summary.targets:
        row = target.cells()
        del row["weights"]
        if target.vanishing is None:
            del row["lost in bf16"]
        if described.ranks:
            rank = described.ranks[target.name]
            row |= {"rank": str(rank), "stable rank": f"{rank.stable_rank:.1f}"}
        rows.append(row)
    return list(rows[0]) if rows else ["weight"], [list(row.values()) for row in rows]
