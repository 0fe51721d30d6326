"""A table of a page, made from records."""

import os
import textwrap
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]
    note: str
    records: list[str]  # folders or files of results/ that the numbers come from
    words: int = 1  # leading columns of text, aligned left; the others hold numbers

    def markdown(self, page: Path, results: Path = RESULTS) -> str:
        """The table, its note and links to its records, relative to the folder of a page."""
        rule = ["---"] * self.words + ["---:"] * (len(self.head) - self.words)
        lines = ["| " + " | ".join(line) + " |" for line in [self.head, rule, *self.rows]]
        links = [f"[{n}]({os.path.relpath(results / name, page.parent)})" for n, name in enumerate(self.records, 1)]
        note = f"{self.note} Record{'s' * (len(links) > 1)}: {', '.join(links)}."
        wrapped = textwrap.fill(note, 120, break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines) + f"\n\n{wrapped}\n"
