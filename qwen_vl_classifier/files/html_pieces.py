"""Pieces of HTML for notebooks: a card of facts, a table, a page in a frame. All that they are given is escaped.

They set no colours, so that they follow a notebook's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

_LEFT = "text-align:left"
_RIGHT = "text-align:right"


def fact_card(title: str, facts: Mapping[str, object], notes: Iterable[str] = ()) -> str:
    """Return a title with a table of facts, each a name and its value, and a line for each note."""
    rows = [
        Markup('<tr><th scope="row" style="{}">{}</th><td style="{}">{}</td></tr>').format(_LEFT, name, _LEFT, value)
        for name, value in facts.items()
    ]
    table = Markup("<table>{}</table>").format(Markup("").join(rows)) if rows else Markup("")
    return str(Markup("<div><p><strong>{}</strong></p>{}{}</div>").format(title, table, _lines(notes)))


def row_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Iterable[int] = (),
    notes: Iterable[str] = (),
) -> str:
    """Return a table whose first row is in bold.

    Args:
        columns: Names of the columns.
        rows: Their cells.
        numbers: Positions of the columns that are aligned to the right.
        notes: Lines below the table.
    """
    right = set(numbers)
    styles = [_RIGHT if position in right else _LEFT for position in range(len(columns))]
    head = Markup("").join(
        Markup('<th scope="col" style="{}">{}</th>').format(style, name)
        for style, name in zip(styles, columns, strict=True)
    )
    body = Markup("").join(
        Markup("<tr{}>{}</tr>").format(
            Markup("") if number else Markup(' style="font-weight:bold"'),
            Markup("").join(
                Markup('<td style="{}">{}</td>').format(style, cell) for style, cell in zip(styles, row, strict=True)
            ),
        )
        for number, row in enumerate(rows)
    )
    whole = Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)
    return str(Markup("<div>{}{}</div>").format(whole, _lines(notes)))


def picture_block(data: str, alt: str, notes: Iterable[str] = ()) -> str:
    """Return a picture, given as a data URL, with a line below it for each note."""
    image = Markup('<img src="{}" alt="{}" style="max-width:min(100%,40em)">').format(data, alt)
    return str(Markup("<div>{}{}</div>").format(image, _lines(notes)))


def page_frame(page: str, title: str) -> str:
    """Return a whole page in a frame: it can run its own scripts and offer downloads, and cannot reach the notebook.

    Links within the page start from the frame; without that they would start from the notebook and open it in there.
    """
    own_links = page.replace("<head>", '<head><base href="about:srcdoc">', 1)
    return str(
        Markup(
            '<iframe title="{}" srcdoc="{}" sandbox="allow-scripts allow-downloads" '
            'style="width:100%;height:640px;border:1px solid #8888"></iframe>'
        ).format(title, own_links)
    )


def _lines(notes: Iterable[str]) -> Markup:
    return Markup("").join(Markup('<p style="margin:0.2em 0">{}</p>').format(note) for note in notes)
