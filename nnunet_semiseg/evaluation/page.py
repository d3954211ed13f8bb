"""The page of a report: the same content as one HTML file and as Markdown."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape as html_escape
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from nnunet_semiseg.evaluation import figures
from nnunet_semiseg.files import written_whole

COLOR_NAMES = dict(zip(
    (figures.REFERENCE_COLOR, *figures.COLORS),
    ("white", "blue", "vermilion", "green", "pink", "orange", "sky blue", "brown", "grey"),
    strict=True,
))  # fmt: skip


@dataclass
class Section:
    """One heading and what stands below it. Each part may be empty.

    Attributes:
        rows: the rows of a table, as strings.
        charts: the charts, by the name of their file without its ending.
        legend: the legend of the images: each name with its colour.
        images: pictures as data URIs, by their captions.
    """

    title: str
    notes: Sequence[str] = ()
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    charts: Mapping[str, figures.Chart] = field(default_factory=dict)
    legend: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What a page shows.

    Attributes:
        facts: what was compared and how, by name.
        warnings: what makes the comparison unfair; shown at the top.
        findings: the results in sentences.
    """

    title: str
    facts: Mapping[str, str]
    sections: list[Section]
    warnings: Sequence[str] = ()
    findings: Sequence[str] = ()


def write(report: Report, output: Path) -> Path:
    """Write `report.html`, which needs no other file, and `report.md` with its files in `figures/`.

    Each chart there is a pair of files: `NAME.svg`, and `NAME.csv` with its numbers. Returns the path of `report.html`.
    """
    environment = Environment(loader=PackageLoader("nnunet_semiseg.evaluation"), autoescape=True)
    html = environment.get_template("report.html").render(report=report)
    markdown = [f"# {report.title}", *(f"- {name}: {fact}" for name, fact in report.facts.items())]
    markdown += [f"**{line}**" for line in report.warnings] + list(report.findings)
    for section in report.sections:
        markdown += [f"## {section.title}", *section.notes]
        if section.rows:
            markdown.append(markdown_table(section.headers, section.rows))
        pictures = {f"{name}.svg": chart.svg.encode() for name, chart in section.charts.items()}
        for i, image in enumerate(section.images.values()):
            pictures[f"{section.title.lower().replace(' ', '_')}_{i}.png"] = base64.b64decode(image.partition(",")[2])
        if section.legend:
            markdown.append("Contours: " + ", ".join(f"{name} {COLOR_NAMES[c]}" for name, c in section.legend.items()))
        captions = [*section.charts, *section.images]
        for (name, content), caption in zip(pictures.items(), captions, strict=True):
            (output / "figures").mkdir(exist_ok=True)
            with written_whole(output / "figures" / name) as temporary:
                temporary.write_bytes(content)
            markdown.append(f"![{caption}](figures/{name})")
        for name, chart in section.charts.items():
            write_csv(chart.data, output / "figures" / f"{name}.csv")
            markdown.append(f"[The numbers of {name}](figures/{name}.csv)")
    text = html_escape("\n\n".join(markdown), quote=False)  # names of cases and classes must not become HTML tags
    for name, content in (("report.md", text + "\n"), ("report.html", html)):
        with written_whole(output / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return output / "report.html"


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table without its index. A text that a spreadsheet would take for a formula gets a quote before it."""
    with written_whole(file) as temporary:
        table.rename(columns=harmless).apply(lambda column: column.map(harmless)).to_csv(temporary, index=False)


def harmless(cell):
    """Put a quote before a text that begins with = + - @, a tab or a carriage return.

    Other cells stay the same. So does a text that is a number, such as "-1.5".
    """
    if not (isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))):
        return cell
    with contextlib.suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown. A `|` in a cell is escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
