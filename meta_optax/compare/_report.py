"""The report of a comparison: for people first, for machines beside it."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt

from meta_optax.compare import _overhead, _tables
from meta_optax.compare._figures import draw_all
from meta_optax.compare._protocol import Plan
from meta_optax.compare._results import Json, plain, summarise, timings
from meta_optax.compare._run import Results
from meta_optax.compare._store import Store, write_bytes, write_json

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25em 0.7em; text-align: left; }
img { max-width: 100%; } code { background: #f3f3f3; padding: 0 0.2em; }
"""


def write_report(plan: Plan, store: Store, results: Results) -> str:
    """Writes the report's files.

    Args:
      plan: what was run.
      store: whose folder it goes to.
      results: of `run_plan`.

    Returns:
      The answer, and where the rest is: what the command prints.
    """
    folder = store.folder
    found = summarise(plan, store.about, results)
    write_json(folder / "results.json", found)
    costs = _overhead.measure_overhead(list(results))
    spent = {"cells": timings(results), "overhead": {k: c._asdict() for k, c in costs.items()}}
    write_json(folder / "timings.json", plain(spent))
    captions = draw_all(plan, found, results, folder)
    text = compose(found, costs, captions)
    write_bytes(folder / "report.md", text.encode())
    write_bytes(folder / "report.html", to_html(text, folder, list(captions)).encode())
    return f"{_tables.answer(found)}\n\n{folder / 'report.html'}"


def compose(found: Json, costs: Mapping[str, Any], captions: Mapping[str, str]) -> str:
    """The report in Markdown: the answer, its intervals and its caveats before all else."""
    budget = found["protocol"]["budget"]
    sections = [
        f"# Comparison of {len(found['arms'])} ways to train, {budget} budget",
        _tables.answer(found),
        "## Caveats",
        _tables.caveats(found),
        "## Against the linear schedule",
        *_picture("forest.png", captions),
        "### Well tuned",
        _tables.against_baseline(found, "well_tuned"),
        "### Mis-set",
        _tables.against_baseline(found, "mis_set"),
        _tables.LEGEND,
        "## Each task",
        _tables.tasks(found),
        _tables.final_losses(found),
        "## Each multiple of the base rate",
        _tables.by_multiple(found),
        "## Over the steps",
        *_picture("loss_curves.png", captions),
        "## Steps to the target",
        *_picture("profile.png", captions),
        _tables.steps(found),
        "## Hyperparameters and decisions",
        *_picture("hyperparameters.png", captions),
        _tables.decisions(found),
        "## What it costs",
        _tables.overhead(costs),
        "## Protocol",
        _tables.protocol(found),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _picture(name: str, captions: Mapping[str, str]) -> Sequence[str]:
    return (f"![{name}]({name})", captions[name]) if name in captions else ()


def to_html(text: str, folder: pathlib.Path, pictures: Sequence[str]) -> str:
    """One page that needs no other file: pictures are in it."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    for name in pictures:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    title = html.escape(text.split("\n", 1)[0].removeprefix("# "))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>\n{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
