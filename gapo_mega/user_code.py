"""The user's own code, named in a configuration: ``module:NAME`` or ``path/to/file.py:NAME``.

``resolve`` runs when a configuration is read. It looks for files, and for modules that Python itself does not
find, in the working directory and then in the configuration's folder, and gives their absolute path. Every
process of a run therefore loads the same code, and so does the configuration that the run records.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import TypeGuard, TypeVar

from gapo_mega.credentials import hidden
from gapo_mega.files import local
from gapo_mega.option_checks import shown

T = TypeVar("T")

CLASS_FORMS = ("module:Class", "path/to/file.py:Class")

_LONGEST_REASON = 300  # characters of what the user's code says
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_reference(name: str) -> bool:
    """Whether ``name`` names the user's own code, rather than something in the package."""
    return ":" in name


def resolve(reference: str, folders: Sequence[Path]) -> str:
    """``reference`` with the absolute path of its file, where that lies in one of ``folders``.

    The first folder that has it wins. Names without a colon, absolute paths and modules that Python finds
    stay as they are, and so do modules that nobody finds: loading them reports the error. Raises
    ``ValueError`` for a relative path in none of the folders, with what is accepted.
    """
    place, colon, name = reference.rpartition(":")
    if not colon:
        return reference
    is_file = place.endswith(".py")
    if is_file:
        files = [local(place)]
    elif _MODULE.fullmatch(place) and not _python_finds(place.partition(".")[0]):
        inner = Path(*place.split("."))
        files = [inner.with_suffix(".py"), inner / "__init__.py"]
    else:
        return reference
    if files[0].is_absolute():
        return f"{files[0]}:{name}"
    for folder in folders:
        for file in files:
            if (folder / file).is_file():
                return f"{os.path.abspath(folder / file)}:{name}"
    if is_file:
        raise ValueError(f"an absolute path, or a file in {' or in '.join(map(str, folders))}")
    return reference


def is_subclass(member: object, base: type[T]) -> TypeGuard[type[T]]:
    """Whether ``member`` is a class derived from ``base``; to Python 3.10 ``list[int]`` is a class."""
    return isinstance(member, type) and not isinstance(member, GenericAlias) and issubclass(member, base)


def load_class(where: str, reference: str, base: type[T]) -> type[T]:
    """The class that ``reference`` names, which must be a concrete subclass of ``base``.

    ``where`` is what errors call the setting. Raises ``ValueError`` for a module, file or class that is not
    there and for anything but such a class. Errors that the user's code raises during its import pass
    through; a ``ValueError`` gets its file and line.
    """

    def fits(member: object) -> bool:
        return is_subclass(member, base) and not inspect.isabstract(member)

    accepted = f"a class derived from {base.__module__}.{base.__qualname__}"
    module, member = _load(where, reference, " or ".join(map(repr, CLASS_FORMS)), fits)
    if is_subclass(member, base):
        missing = sorted(getattr(member, "__abstractmethods__", ()))
        if not missing:
            return member
        found = f"which does not define {', '.join(missing)}"
    else:
        found = "a class of another kind" if isinstance(member, type) else f"of type {type(member).__name__}"
    nearest = _nearest(module, reference.rpartition(":")[2], fits)
    raise ValueError(f"{where}: found {reference}, {found}{nearest}; accepted: {accepted}")


def load_function(where: str, reference: str | None) -> Callable[..., object]:
    """The function that ``reference`` names; errors as for ``load_class``."""
    _, member = _load(where, reference, "'module:function' or 'path/to/file.py:function'", callable)
    if not callable(member):
        raise ValueError(f"{where}: found {reference} of type {type(member).__name__}, accepted: a function")
    checked: Callable[..., object] = member
    return checked


def _load(
    where: str, reference: str | None, accepted: str, fits: Callable[[object], bool]
) -> tuple[ModuleType, object]:
    """The module of ``reference``, and what it names there; errors suggest a name whose value ``fits``."""
    place, _, name = (reference or "").rpartition(":")
    is_file = place.endswith(".py")
    if not name.isidentifier() or not (is_file or _MODULE.fullmatch(place)):
        raise ValueError(f"{where}: found {reference!r}, accepted: {accepted}")
    with _with_file_and_line(where):
        module = _of_file(where, Path(place)) if is_file else _of_name(where, place)
    if name not in vars(module):
        shown = f"file {place}" if is_file else f"module {place!r}"
        raise ValueError(f"{where}: {shown} has no {name!r}{_nearest(module, name, fits)}")
    return module, vars(module)[name]


def _nearest(module: ModuleType, name: str, fits: Callable[[object], bool]) -> str:
    """A hint at the nearest name in ``module`` whose value fits; what it defines itself comes first."""
    members = vars(module)
    public = [key for key, value in members.items() if fits(value) and not key.startswith("_")]
    own = [key for key in public if getattr(members[key], "__module__", "") == module.__name__]
    nearest = difflib.get_close_matches(name, own or public, n=1, cutoff=0.0)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _of_name(where: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not _is_part_of(error.name, name):
            raise
        raise ValueError(
            f"{where}: found module {name!r}, which Python does not find ({error.name!r} is missing); "
            "install it or put its folder on PYTHONPATH"
        ) from None


def _is_part_of(missing: str | None, name: str) -> bool:
    """Whether the module ``name`` itself is missing, not something that it imports in turn."""
    return missing is not None and f"{name}.".startswith(f"{missing}.")


def _of_file(where: str, file: Path) -> ModuleType:
    """The module of ``file``, the same one each time.

    Its folder, or that of its outermost package, goes to the end of ``sys.path`` and stays there: the file
    may import its neighbours, at once or when it is called, and shadows nothing.
    """
    path = Path(os.path.abspath(local(file)))
    if not path.is_file():
        raise ValueError(f"{where}: file {file} not found, accepted: a Python file")
    root, name = path.parent, path.stem
    while (root / "__init__.py").is_file():
        root, name = root.parent, f"{root.name}.{name}"
    name = name.removesuffix(".__init__")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    if _is_found_as(name, path):
        return importlib.import_module(name)
    return _under_a_name_of_its_own(path)


def _is_found_as(name: str, path: Path) -> bool:
    """Whether importing ``name`` gives the file ``path``; a module of the same name may come first."""
    if not _MODULE.fullmatch(name):
        return False
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # __main__ has none
        return False
    except ModuleNotFoundError as error:
        if not _is_part_of(error.name, name):
            raise
        return False  # a module of a package's name lies in the way
    return spec is not None and spec.origin is not None and os.path.abspath(spec.origin) == str(path)


def _under_a_name_of_its_own(path: Path) -> ModuleType:
    # The name is the same in every process, so that the others can read what one pickles.
    name = f"user_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "its name ends with .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _python_finds(top: str) -> bool:
    """Whether Python finds ``top`` elsewhere than through the working directory on its path.

    ``python -m`` and torchrun put that directory first, the console script does not: this way a name
    resolves alike in both.
    """
    if top == __name__.partition(".")[0]:
        return True
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__ has none
        return True
    if spec is None:
        return False
    here = os.getcwd()
    if sys.path[0] not in ("", here) or here in sys.path[1:]:
        return True
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""]
    return not any(os.path.dirname(place) == here for place in places)


@contextmanager
def _with_file_and_line(where: str) -> Iterator[None]:
    """Add file and line to a ``ValueError`` of the user's code: the command shows it as one line.

    ``sys.exit`` becomes one: a module that is imported must not end the process without a word.
    """
    try:
        yield
    except (ValueError, SystemExit) as error:
        ours = (__file__, importlib.__file__)
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [f for f in frames if f.filename not in ours and not f.filename.startswith("<frozen ")]
        if not theirs:
            raise
        first = theirs[0]
        what = str(error) if isinstance(error, ValueError) else reason_of(error)
        raise ValueError(f"{where}: {first.filename}, line {first.lineno}: {what}") from error


def reason_of(error: BaseException) -> str:
    """What ``error`` of the user's code says, on one line, with its type unless that is ``ValueError``."""
    if isinstance(error, SystemExit):
        return f"found sys.exit({shown(error.code)}), accepted: code that returns or raises"
    try:
        said = " ".join(str(error).split())
    except Exception as further:
        said = f"its text cannot be made ({type(further).__name__})"
    said = hidden(said)  # first: a cut in the middle of a secret would leave half of it
    said = said if len(said) <= _LONGEST_REASON else said[: _LONGEST_REASON - 3] + "..."
    kind = type(error).__qualname__
    return said if said and type(error) is ValueError else f"{kind}: {said}" if said else kind


def place_of(error: BaseException) -> str:
    """File and line of the user's code at which ``error`` arose.

    That is the last frame that is neither of this package nor of an installed one: a reward that hands
    something wrong to a library is at fault where it does so. Without such a frame, the last of all.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    theirs = [frame for frame in frames if not frame.filename.startswith(("<frozen ", *_installed()))]
    last = (theirs or frames)[-1]
    return f"{last.filename}, line {last.lineno}"


def _installed() -> tuple[str, ...]:
    """Beginnings of the paths of this package's files, Python's own and those of installed packages."""
    own = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return (own, *(os.path.join(place, "") for place in sorted(places)))
