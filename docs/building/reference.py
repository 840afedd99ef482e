"""The reference is made of the package: lists of modules and names, docstrings in Markdown, nothing left out.

A line `<!-- every module of ROOM -->` in a page becomes a section for each module in that folder of the package,
`<!-- every name of efficientsam_hf -->` a table of what the package itself exports, and `<!-- every command -->` the
help of the command line.
"""

import re
from importlib import import_module
from pkgutil import walk_packages

import typer.main
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.logging import getLogger

import efficientsam_hf
from efficientsam_cli import app as command_line

SECTION = "## {title}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def modules_below(package: str) -> list[str]:
    """Dotted names of all modules in a package, without the packages themselves."""
    found = walk_packages(import_module(package).__path__, f"{package}.")
    return [module.name for module in found if not module.ispkg]


def sections(room: str) -> str:
    """A section for each module of a room."""
    modules = modules_below(f"efficientsam_hf.{room}")
    return "\n".join(SECTION.format(title=name.removeprefix("efficientsam_hf."), module=name) for name in modules)


def described_in(name: str) -> str:
    """Where a name of the front door is described: in the module whose `__all__` has it too, or that defines it."""
    value = getattr(efficientsam_hf, name)
    for module in modules_below("efficientsam_hf"):
        if name in getattr(import_module(module), "__all__", []):
            return f"{module}.{name}"
    return f"{getattr(value, '__module__', 'efficientsam_hf')}.{name}"


def constant_text(module: str, name: str) -> str:
    """What the `#:` comment of a constant says."""
    return " ".join(ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name), []))


def front_door() -> str:
    """A table of what `efficientsam_hf` exports, with the first sentence of each docstring."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in sorted(efficientsam_hf.__all__, key=lambda name: (name.startswith("_"), name.lower())):
        if name == "__version__":
            rows.append("| `__version__` | Of the package. |")
            continue
        module, value = described_in(name).rpartition(".")[0], getattr(efficientsam_hf, name)
        text = value.__doc__ if callable(value) else constant_text(module, name)
        first = re.split(r"(?<=\.)\s|\n\n", text.strip())[0].replace("\n", " ")
        rows.append(f"| {{py:obj}}`{name} <{module}.{name}>` | {first} |")
    return "\n".join(rows)


def commands(group=None, name: str = "efficientsam") -> str:
    """A section for each command: what it does, and a table of its arguments."""
    group = group or typer.main.get_command(command_line)
    parts = []
    for own, command in group.commands.items():
        title = f"{name} {own}"
        parts.append(commands(command, title) if hasattr(command, "commands") else command_section(title, command))
    return "\n".join(parts)


def command_section(title: str, command) -> str:
    """One command."""
    rows = ["| argument | what it is |", "|---|---|"]
    for parameter in command.params:
        option = parameter.opts[0]
        shown = option if option.startswith("-") else option.upper()
        rows.append(f"| `{shown}` | {parameter.help} |".replace("\n", " "))
    text = re.sub(r"(?m)^ +", "", command.help or "").strip()
    return f"## {title}\n\n{text}\n\n" + "\n".join(rows) + "\n"


def expand(app, page: str, source: list[str]) -> None:
    """Put what the package has in the place of the two kinds of lines."""
    if page.startswith("reference/"):
        text = re.sub(r"<!-- every module of (\w+) -->", lambda found: sections(found[1]), source[0])
        text = re.sub("<!-- every name of efficientsam_hf -->", lambda _: front_door(), text)
        source[0] = re.sub("<!-- every command -->", lambda _: commands(), text)


def markdown_code(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn the code of docstrings, between fences or indented under `Example:`, into Sphinx's code blocks."""
    found: list[str] = []
    block = None
    for line in lines:
        fence = re.match(r"( *)```(\w*)$", line)
        if fence and block != "fence":
            block = "fence"
            found += ["", f"{fence[1]}.. code-block:: {fence[2] or 'text'}", ""]
        elif fence:
            block = None
            found.append("")
        elif block == "example" and line[:1].strip():
            block = None
            found.append(line)
        elif re.match(r"Examples?:$", line):
            block = "example"
            found += [line, "    .. code-block:: python", ""]
        else:
            found.append(f"    {line}" if block else line)
    lines[:] = found


def columns(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep a module's paragraphs in columns as they stand; Sphinx would run them on."""
    if what != "module":
        return
    found = []
    for paragraph in "\n".join(lines).split("\n\n"):
        if re.search(r"\S {3,}\S", paragraph):
            paragraph = "::\n\n" + re.sub(r"(?m)^", "    ", paragraph.strip("\n"))
        found.append(paragraph)
    lines[:] = "\n\n".join(found).split("\n")


def check(app, env) -> None:
    """A public name that is not in the reference is a warning, and so an error."""
    described = env.get_domain("py").objects
    wanted = [described_in(name) for name in efficientsam_hf.__all__ if not name.startswith("_")]
    for module in modules_below("efficientsam_hf"):
        wanted += [f"{module}.{name}" for name in getattr(import_module(module), "__all__", [])]
    for name in dict.fromkeys(wanted):
        if name not in described:
            getLogger(__name__).warning("%s is public, but not in docs/reference", name)


def setup(app) -> dict:
    app.connect("source-read", expand)
    app.connect("env-check-consistency", check)
    # Before napoleon, whose own listener has the usual priority of 500.
    app.connect("autodoc-process-docstring", columns, priority=300)
    app.connect("autodoc-process-docstring", markdown_code, priority=400)
    return {"parallel_read_safe": True}
