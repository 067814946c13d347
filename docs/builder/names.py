"""Names: what is defined where, and how its address is written on a page of the site."""

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from source import definitions, imported, module_name, parts_of

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "minicpgd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]


class Site:
    """What is where: modules and their parts, names and where they are defined."""

    def __init__(self) -> None:
        paths = {module_name(path, PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
        self.paths = {name: paths[name] for name in sorted(paths, key=_floor())}
        self.sources = {name: path.read_text() for name, path in self.paths.items()}
        self.parts = {name: parts_of(text) for name, text in self.sources.items()}
        self.notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
        self.metrics = re.findall(r"^## `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
        self.defined = {name: set(definitions(parts)) for name, parts in self.parts.items()}
        self.imports = {name: list(imported(text)) for name, text in self.sources.items()}
        self.known = self._known()
        self.spoken = self._spoken()

    def _known(self) -> dict[str, str]:
        """Every name that means one thing only, and its address; the names of files, too."""
        places: dict[str, list[str]] = {}
        for module, names in self.defined.items():
            for name in names:
                places.setdefault(name, []).append(f"{source_page(module)}#{name}")
        known = {name: found[0] for name, found in places.items() if len(found) == 1 and not name.startswith("_")}
        for module, path in self.paths.items():
            files = [str(path.relative_to(ROOT)), str(path.relative_to(PACKAGE)), f"minicpgd.{module}"]
            files += [f"{path.parent.relative_to(ROOT)}/"] if path.name == "__init__.py" else []
            known |= dict.fromkeys(files, source_page(module))
        return known | {path.name: f"notebooks/{path.stem}.html" for path in self.notebooks}

    def _spoken(self) -> dict[str, str]:
        """For prose, where a bare word is a setting or a metric: `known`, and those."""
        settings = [name for name in self.defined["config"] if name.startswith("TrainConfig.")]
        known = self.known | {name.partition(".")[2]: f"{source_page('config')}#{name}" for name in settings}
        return known | {name: f"metrics/{name}.html" for name in self.metrics}

    def resolve(self, module: str, name: str) -> str | None:
        """The address of a name of a module, be it defined there or imported."""
        if name in self.defined.get(module, ()):
            return f"{source_page(module)}#{name}"
        below = f"{module}.{name}".strip(".")
        if below in self.parts:
            return source_page(below)
        for here, origin, there in self.imports.get(module, ()):
            if here == name and (origin, there) != (module, name):
                return self.resolve(origin, there)
        return None

    def scope(self, source: str, module: str | None = None) -> dict[str, str]:
        """The names that mean something in a piece of Python, each with its address."""
        names = {}
        for here, origin, there in imported(source):
            found = self.resolve(origin, there) if there else source_page("")
            if found:
                names[here] = found
            below = f"{origin}.{there}".strip(".")
            if below in self.parts:  # a module: its names, with a dot
                inside = self.defined[below] | {alias for alias, *_ in self.imports[below]}
                names |= {f"{here}.{name}": at for name in inside if (at := self.resolve(below, name))}
        if module is not None:
            names |= {name: f"{source_page(module)}#{name}" for name in self.defined[module]}
        return names


def _floor() -> Callable[[str], tuple[int, str]]:
    """Modules from the ground up, as the import contract in pyproject.toml has them; the package's own first."""
    contract = PROJECT["tool"]["importlinter"]["contracts"][0]
    layers = [layer.removeprefix("minicpgd.") for layer in reversed(contract["layers"])]
    order = {name: number for number, name in enumerate(layers)}
    return lambda name: (order.get(name.split(".")[0], -1 if not name else len(order)), name)


def source_page(module: str) -> str:
    """The address of a module's page, from the site's root."""
    return f"source/{module or 'minicpgd'}.html"


def linker(origin: Path, root: str, missing: list[str]) -> Callable[[str], str]:
    """A function from an address as written in `origin` to one on the site; what leads nowhere goes to `missing`."""

    def link(address: str) -> str:
        if re.match(r"[a-z]+:|#", address):
            return address
        path, _, fragment = address.partition("#")
        target = (origin.parent / path).resolve()
        inside = PurePosixPath(target.relative_to(ROOT))
        hash_ = f"#{fragment}" if fragment else ""
        if not target.exists():
            missing.append(f"{origin.relative_to(ROOT)}: {address}")
        if inside.parts[:2] == ("docs", "figures"):
            return f"{root}{inside.relative_to('docs')}"
        if inside.parent == PurePosixPath("docs") and inside.suffix == ".md":
            return f"{root}{inside.stem}.html{hash_}"
        if inside.parts[0] == "notebooks" and inside.stem[:2].isdigit():
            return f"{root}notebooks/{inside.stem}.html{hash_}"
        if inside.parts[0] == "minicpgd" and inside.suffix == ".py":
            return f"{root}{source_page(module_name(target, PACKAGE))}{hash_}"
        if str(inside) == "README.md":
            return f"{root}index.html{hash_}"
        return f"{REPOSITORY}/tree/main/{inside}{hash_}"

    return link


def prefixed(names: Mapping[str, str], root: str) -> dict[str, str]:
    """The same addresses, seen from a page."""
    return {name: root + address for name, address in names.items()}
