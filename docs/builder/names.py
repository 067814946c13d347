"""Names: which module defines what, and how the address of a definition is written on a page of the site."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from source import definitions, imported, module_name, parts_of

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "minicpgd"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
LAYERS = [layer.removeprefix("minicpgd.") for layer in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]]
OUTSIDE_DOCS = {"README.md": "index.html", "CONTRIBUTING.md": "contributing.html"}


class Site:
    """All modules, notebooks and metrics, and the address of each name that they define."""

    def __init__(self) -> None:
        paths = {module_name(path, PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
        imports = {name: list(imported(path.read_text())) for name, path in paths.items()}
        self.paths = {name: paths[name] for name in reading_order(imports)}
        self.imports = {name: imports[name] for name in self.paths}
        self.sources = {name: path.read_text() for name, path in self.paths.items()}
        self.parts = {name: parts_of(text) for name, text in self.sources.items()}
        self.notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
        self.metrics = re.findall(r"^## `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE)
        self.defined = {name: set(definitions(parts)) for name, parts in self.parts.items()}
        self.known = self._known()
        self.prose_names = self._prose_names()

    def is_package(self, module: str) -> bool:
        """Is the module the `__init__.py` of a package?"""
        return self.paths[module].name == "__init__.py"

    def members(self, package: str) -> list[str]:
        """The modules and packages directly inside a package, in reading order."""
        inside = f"{package}." if package else ""
        depth = inside.count(".")
        return [name for name in self.paths if name and name.startswith(inside) and name.count(".") == depth]

    def descendants(self, package: str) -> list[str]:
        """All modules and packages below a package, in reading order."""
        return [name for name in self.paths if name.startswith(f"{package}.")]

    def neighbours(self, module: str) -> dict[str, str]:
        """The addresses of the files in the folder of a module, and of the packages in it, by their bare names."""
        folder = self.paths[module].parent
        files = {path.name: source_page(name) for name, path in self.paths.items() if path.parent == folder}
        packages = [name for name, path in self.paths.items() if path.parent.parent == folder and self.is_package(name)]
        return files | {self.paths[name].parent.name: source_page(name) for name in packages}

    def _known(self) -> dict[str, str]:
        """The addresses of all names with one meaning, of what packages export, and of files and packages."""
        addresses: dict[str, list[str]] = {}
        for module, names in self.defined.items():
            for name in names:
                addresses.setdefault(name, []).append(f"{source_page(module)}#{name}")
        for module, path in self.paths.items():
            if not self.is_package(module):
                addresses.setdefault(path.name, []).append(source_page(module))
        known = {name: found[0] for name, found in addresses.items() if len(found) == 1 and not name.startswith("_")}
        for module, path in self.paths.items():
            inside = path.relative_to(PACKAGE)
            names = [f"minicpgd/{inside}", str(inside), f"minicpgd.{module}"] + [module] * ("." in module)
            if self.is_package(module):
                names += [f"minicpgd/{inside.parent}/", f"{inside.parent}/"]
                exported = {alias: self.resolve(module, alias) for alias, *_ in self.imports[module]}
                known |= {f"minicpgd.{module}.{alias}".replace("..", "."): at for alias, at in exported.items() if at}
            known |= dict.fromkeys(names, source_page(module))
        return known | {path.name: f"notebooks/{path.stem}.html" for path in self.notebooks}

    def _prose_names(self) -> dict[str, str]:
        """`known`, and what a bare word means in prose: a setting (also as a flag) or a metric."""
        fields = {name.partition(".")[2]: f"{source_page('config')}#{name}" for name in self._settings()}
        flags = {f"--{name.replace('_', '-')}": address for name, address in fields.items()}
        return self.known | fields | flags | {name: f"metrics/{name}.html" for name in self.metrics}

    def _settings(self) -> list[str]:
        """The fields of the settings in config.py, as `TrainConfig.seed`."""
        fields = [part for part in self.parts["config"] if part.inside and not part.defines]
        return [name for part in fields for name in [part.full_name, *part.also] if not name.endswith(".")]

    def resolve(self, module: str, name: str) -> str | None:
        """The address of a module's name: where the module defines it, or where it imports it from."""
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
        """The names that a piece of Python can use, each with its address."""
        names = {}
        for here, origin, there in imported(source):
            address = self.resolve(origin, there) if there else source_page("")
            if address:
                names[here] = address
            below = f"{origin}.{there}".strip(".")
            if below in self.parts:  # The import is a module, whose names follow a dot.
                inside = self.defined[below] | {alias for alias, *_ in self.imports[below]}
                names |= {f"{here}.{name}": at for name in inside if (at := self.resolve(below, name))}
        if module is not None:
            names |= {name: f"{source_page(module)}#{name}" for name in self.defined[module]}
        return names


def reading_order(imports: Mapping[str, Iterable[tuple[str, str, str]]]) -> list[str]:
    """Sort modules so that a module comes after those that it imports.

    Packages follow the layers of the import contract in pyproject.toml, lowest first. A package's own page comes before
    its modules. Modules of one package follow their imports of each other, and then the alphabet.
    """
    rank = {name: number for number, name in enumerate(reversed(LAYERS))} | {"": -1}
    tops = sorted({name.partition(".")[0] for name in imports}, key=lambda top: (rank.get(top, len(rank)), top))
    order: list[str] = []
    for top in tops:
        waiting = sorted(name for name in imports if name.partition(".")[0] == top and name != top)
        order += [top] if top in imports else []
        while waiting:
            ready = (name for name in waiting if not _imported_modules(imports[name], set(waiting) - {name}))
            order.append(next(ready, waiting[0]))
            waiting.remove(order[-1])
    return order


def _imported_modules(imports: Iterable[tuple[str, str, str]], among: set[str]) -> set[str]:
    return {module for _, origin, there in imports for module in (origin, f"{origin}.{there}")} & among


def source_page(module: str) -> str:
    """The address of a module's page, from the site's root."""
    return f"source/{module or 'minicpgd'}.html"


def linker(origin: Path, root: str, missing: list[str]) -> Callable[[str], str]:
    """A function that turns an address in the file `origin` into one on the site; it adds broken links to `missing`."""

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
        if (target / "__init__.py").exists():
            target = target / "__init__.py"
        if inside.parts[0] == "minicpgd" and target.suffix == ".py":
            return f"{root}{source_page(module_name(target, PACKAGE))}{hash_}"
        if str(inside) in OUTSIDE_DOCS:
            return f"{root}{OUTSIDE_DOCS[str(inside)]}{hash_}"
        return f"{REPOSITORY}/tree/main/{inside}{hash_}"

    return link


def prefixed(names: Mapping[str, str], root: str) -> dict[str, str]:
    """The same addresses, as seen from a page whose way to the site's root is `root`."""
    return {name: root + address for name, address in names.items()}
