"""What mkdocs makes while it builds the site: the CLI reference, the gallery's pages, the changelog.

Nothing of it is kept in the repository, so that no page can be older than the program.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "examples" / "gallery"


class Example(NamedTuple):
    """One script of the gallery.

    Attributes:
        script: the file.
        name: of its page, its picture and its output, without suffix.
        title: the first line of its docstring.
        text: the rest of the docstring.
        code: the program below it.
    """

    script: str
    name: str
    title: str
    text: str
    code: str


def examples() -> list[Example]:
    """Return the scripts of the gallery in the order of their numbers."""
    return [read_example(path) for path in sorted(GALLERY.glob("[0-9]*.py"))]


def read_example(path: Path) -> Example:
    """Split a script into title, text and code."""
    source = path.read_text()
    tree = ast.parse(source)
    title, _, text = (ast.get_docstring(tree) or "").partition("\n")
    lines = source.splitlines()
    code = "\n".join(lines[tree.body[0].end_lineno or 0 :]).strip()
    return Example(path.name, path.stem.partition("_")[2], title.removesuffix("."), text.strip(), code)


def gallery_page(example: Example) -> str:
    """Return the page of one script: text, code, what it prints, what it draws."""
    output = ROOT / "docs" / "gallery" / f"{example.name}.txt"
    printed = f"\nIt prints\n\n```text\n{output.read_text().rstrip()}\n```\n" if output.is_file() else ""
    return (
        f"# {example.title}\n\n{example.text}\n\n```python\n{example.code}\n```\n{printed}\n"
        f"![{example.title}]({example.name}.png)\n\nThe script is `examples/gallery/{example.script}`.\n"
    )


def gallery_index() -> str:
    """Return the pictures of all scripts with their titles, each a link."""
    items = [
        f"-   [![{example.title}]({example.name}.png)]({example.name}.md)\n\n    [{example.title}]({example.name}.md)\n"
        for example in examples()
    ]
    return '<div class="grid cards" markdown>\n\n' + "\n".join(items) + "\n</div>\n"


def command_pages() -> Iterator[str]:
    """Yield a section for each command of the program: what it does, arguments, options, defaults, examples."""
    import typer.main

    from qtdog.cli.main import app

    yield from _sections(typer.main.get_command(app), "qtdog")


def _sections(command: Any, path: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if command.hidden:
        return
    if children is None:
        yield f"## {path}\n\n{_help(command.help or '')}\n\n{_arguments(command)}{_options(command)}"
        return
    for name, child in children.items():
        yield from _sections(child, f"{path} {name}")


def _help(text: str) -> str:
    """Return a help text as Markdown: its examples are a block of code, the rest paragraphs."""
    about, found, calls = re.sub(r"\n\s*\n", "\n\n", text).partition("Example")
    if not found:
        return _escaped(about)
    lines = [line.strip() for line in calls.splitlines()[1:]]
    first = next((i for i, line in enumerate(lines) if line and not line.startswith("qtdog")), len(lines))
    block = "\n".join(re.sub(r"\s{2,}\((.*)\)$", r"  # \1", line) for line in lines[:first] if line)
    rest = _escaped("\n".join(lines[first:]))
    return f"{_escaped(about)}\n\n```bash\n{block}\n```\n\n{rest}"


def _escaped(text: str) -> str:
    return text.strip().replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")


def _arguments(command: Any) -> str:
    given = [p for p in command.params if p.param_type_name == "argument" and not p.hidden]
    rows = [f"| `{p.metavar or p.name.upper()}` | {_cell(p.help)} |" for p in given]
    return "\n".join(["| argument | meaning |", "| --- | --- |", *rows, "", ""]) if rows else ""


def _options(command: Any) -> str:
    given = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    rows = [f"| {_spelling(p)} | {_cell(p.help)}{_default(p)} |" for p in given]
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows, "", ""]) if rows else ""


def _spelling(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def _cell(text: str | None) -> str:
    return _escaped(text or "").replace("|", r"\|").replace("\n", " ")


def _default(option: Any) -> str:
    value = option.default
    if value in (None, (), [], False) or "efault" in (option.help or "") or callable(value):
        return ""
    return f" Default `{getattr(value, 'value', value)}`."


def on_files(files: Any, config: Any) -> Any:
    """Add the gallery's pages."""
    from mkdocs.structure.files import File, InclusionLevel

    for example in examples():
        page = f"gallery/{example.name}.md"
        files.append(File.generated(config, page, content=gallery_page(example), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Keep options whole: a browser would break a line of code inside of `--data`."""
    return re.sub(r"<code>([^<\n]*)</code>", lambda found: f"<code>{whole_options(found[1])}</code>", html)


def whole_options(code: str) -> str:
    """Return inline code whose options are not broken.

    Example:
        >>> whole_options("qtdog train --data photos/")
        'qtdog train <span class="whole">--data</span> photos/'
    """
    return re.sub(r"(?<![\w-])(--?[\w][\w-]*)", r'<span class="whole">\1</span>', code)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the pages that are made: command line, gallery, changelog."""
    made = {
        "cli.md": lambda: "\n".join(command_pages()),
        "gallery/index.md": gallery_index,
        "changelog.md": lambda: (ROOT / "CHANGELOG.md").read_text().partition("\n")[2],
    }
    make = made.get(page.file.src_uri)
    return markdown if make is None else f"{markdown}\n\n{make()}"
