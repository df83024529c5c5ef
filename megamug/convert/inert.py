"""Torch files of other projects' scripts, read for their tensors: `args: argparse.Namespace`, numpy scalars and
whatever else lies beside them become placeholders that hold what was pickled and do nothing.

A pickle is a program of calls. This reader knows the calls that make tensors and plain containers, all by functions of
its own; every other name in the file is an empty class made here: nothing is imported, looked up or run, and nothing
that exists outside of the file is changed. What is asked of the operating system has no innocent reason to be in a file
of tensors and ends the reading.

torch reads the archive (storages, their types and places); its hook for it is `torch.load(pickle_module=...)`.
"""

from __future__ import annotations

import pickle
import tarfile
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from megamug.errors import UserError

SYSTEM = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "runpy", "ctypes", "socket", "importlib", "pty", "webbrowser",
}  # fmt: skip
PROGRAMS = {"eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint"}  # of builtins


class Inert:
    """An object of a class that is not known here. `state` is what its pickle would have set."""

    named = ""
    state: object = None


class _Refused(Exception):
    pass


def _tensor(storage, offset, size, stride, *_rest) -> torch.Tensor:
    """Of `torch._utils._rebuild_tensor` and `_v2`, whose gradients' hooks are of no use here."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data, *_rest):
    return data


def _of_type(function, _type, arguments, _state):
    """Of `torch._tensor._rebuild_from_type_v2`: a parameter or tensor with attributes, without them."""
    return _called(function, arguments)


def _mapping(*arguments) -> dict:
    return OrderedDict(*[a for a in arguments if isinstance(a, dict | list)])


def _collection(kind: type):
    return lambda *arguments: kind(*[a for a in arguments if isinstance(a, list | tuple | set | frozenset | dict)])


_UTILS = "torch._utils"
_KNOWN: dict[tuple[str, str], Any] = {
    (_UTILS, "_rebuild_tensor"): _tensor, (_UTILS, "_rebuild_tensor_v2"): _tensor,
    (_UTILS, "_rebuild_parameter"): _parameter, (_UTILS, "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Size"): _collection(tuple),
    **{("collections", name): _mapping for name in ("OrderedDict", "defaultdict", "Counter")},
    **{(module, kind.__name__): _collection(kind) for module in ("builtins", "__builtin__")
       for kind in (set, frozenset, list, tuple, dict)},
}  # fmt: skip
_CALLED = {id(function) for function in _KNOWN.values()}


def _called(function: Any, arguments: Any) -> Any:
    if isinstance(function, type) and issubclass(function, Inert):
        return function()
    if id(function) not in _CALLED or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("a call of something else than a name")
    return function(*arguments)


class InertUnpickler(pickle._Unpickler):
    """The interpreter of pickles written in Python, whose steps can be replaced, with the steps that call or set
    something replaced. `unknown` collects the names that became placeholders."""

    unknown: dict[str, type]
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in SYSTEM or module in ("builtins", "__builtin__") and name in PROGRAMS:
            raise _Refused(f"{module}.{name}")
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in (("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")):
            return torch.UntypedStorage  # a name that torch compares; it is not called
        full = f"{module}.{name}"
        return self.unknown.setdefault(full, type("Placeholder", (Inert,), {"named": full}))

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("an entry of a registry of extensions")

    def _instantiate(self, klass: Any, arguments: Any) -> None:
        self.append(_called(klass, tuple(arguments)))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):  # of a dictionary or tensor: attributes, which nobody reads
            self.stack[-1].state = state

    def load_append(self) -> None:
        item = self.stack.pop()
        self._fill(list, lambda found: found.append(item))

    def load_appends(self) -> None:
        items = self.pop_mark()
        self._fill(list, lambda found: found.extend(items))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(dict, lambda found: found.__setitem__(key, value))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._fill(dict, lambda found: found.update(zip(items[::2], items[1::2], strict=True)))

    def load_additems(self) -> None:
        items = self.pop_mark()
        self._fill(set, lambda found: found.update(items))

    def _fill(self, kind: type, fill) -> None:
        if isinstance(self.stack[-1], kind):
            fill(self.stack[-1])
        elif not isinstance(self.stack[-1], Inert):
            raise pickle.UnpicklingError(f"items for a {type(self.stack[-1]).__name__}")

    for _opcode, _step in {
        pickle.REDUCE: load_reduce, pickle.NEWOBJ: load_reduce, pickle.NEWOBJ_EX: load_newobj_ex,
        pickle.BUILD: load_build, pickle.APPEND: load_append, pickle.APPENDS: load_appends,
        pickle.SETITEM: load_setitem, pickle.SETITEMS: load_setitems, pickle.ADDITEMS: load_additems,
    }.items():  # fmt: skip
        dispatch[_opcode[0]] = _step


def load(path: Path) -> tuple[object, list[str]]:
    """What the torch file `path` holds, tensors on the CPU and mapped where the format can be, and the names of what
    became a placeholder in it.

    Raises UserError: it names the operating system; it is damaged, no such file, or a tar archive as torch wrote before
    version 0.1.10 (unpacking it would write files).
    """
    if tarfile.is_tarfile(path):
        raise UserError(f"{path} is a tar archive; give a file that torch.save wrote")
    reader = types.ModuleType("inert")
    unknown: dict[str, type] = {}
    reader.Unpickler = type("Unpickler", (InertUnpickler,), {"unknown": unknown})
    reader.load = lambda file, **options: reader.Unpickler(file, **options).load()
    options = {"map_location": "cpu", "pickle_module": reader, "weights_only": False}
    try:
        try:
            content = torch.load(path, mmap=True, **options)
        except RuntimeError:  # the format before 1.6 cannot be mapped
            content = torch.load(path, mmap=False, **options)
    except _Refused as refused:
        raise UserError(
            f"{path} names {refused}, which no file of tensors has a use for. It was not run; do not use this file, and"
            " ask where it is from"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a pickle of noise can fail in any way
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged, or no file of tensors ({first}); copy it again") from None
    return content, sorted(unknown)
