"""What --help shows of a command: its options in groups, with their names whole however narrow the terminal is."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

_FIRST = ("Arguments", "Run")  # what a command needs to be told


class Command(TyperCommand):
    """A command whose options appear under the headings of their groups, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group: those that are needed, then in the order of the options.

        The types are click's, which typer contains.
        """
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                alone = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or alone
                sections.setdefault(title, []).append(record)

        for title in sorted(sections, key=lambda title: title not in _FIRST):
            with formatter.section(title):
                formatter.write_dl(sections[title])
