"""float32 models of checkpoints in 16 bits: large weights stay in their files, and are widened where they are used.

In the place of each stands a parameter of float32 whose memory nobody has touched, so that it takes none. torch's
exporter asks for shapes and types alone, and the graph finds the weight in its file by the parameter's address. Where
the model runs, a module has its weights, widened, for the time of its own call. Whatever else reads such a parameter
leaves pages behind, which the kernel tells: then it is given its values, and what was computed is computed again.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import onnx

from llmc.compiler.loaders.mapped import MappedFiles, Place, touched

if TYPE_CHECKING:
    import torch

LARGE = 1 << 20
"""Bytes of a parameter, as float32, from which it stays in its file."""

Made = TypeVar("Made")


@contextmanager
def read_as_stored(asked: bool = True) -> Iterator[dict[str, torch.dtype]]:
    """Where `asked`, what transformers loads inside keeps the types of its files; gives those it was to have, by name.

    Gives none where all is loaded as it was to be: also where transformers has no plan of types that could be changed.
    """
    from transformers import PreTrainedModel

    wanted: dict[str, torch.dtype] = {}
    plan = getattr(PreTrainedModel, "_get_dtype_plan", None)
    if plan is None or not asked:
        yield wanted
        return

    def as_stored(model: torch.nn.Module, _dtype: torch.dtype) -> dict[str, None]:
        wanted.update((name, tensor.dtype) for name, tensor in model.state_dict().items())
        return {"": None}  # whatever its name is, no type

    PreTrainedModel._get_dtype_plan = as_stored
    try:
        yield wanted
    finally:
        PreTrainedModel._get_dtype_plan = plan


@dataclass
class _StandIn:
    """A parameter of float32 that has no values, or has been given them."""

    parameter: torch.nn.Parameter
    stored: torch.Tensor
    """Its values, in 16 bits, mapped from their file."""
    filled: bool = False

    def fill(self) -> None:
        self.parameter.data.copy_(self.stored)
        self.filled = True


class Widened:
    """A torch model whose weights have the types in `wanted`, by name, though `files` may hold them in 16 bits."""

    def __init__(self, model: torch.nn.Module, files: MappedFiles, wanted: Mapping[str, torch.dtype]) -> None:
        self.files = files
        self._stand_ins: dict[int, _StandIn] = {}
        """By the addresses of their parameters."""
        changed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """id of a tensor → it (so that the id stays its own) and what stands for it; tied ones stay one."""
        for path, module in model.named_modules(remove_duplicate=False):
            held = {}
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                dtype = wanted.get(f"{path}.{name}" if path else name)
                if tensor is None or dtype is None or tensor.dtype == dtype:
                    continue
                if id(tensor) not in changed:
                    changed[id(tensor)] = tensor, self._as(dtype, tensor, stays=module is not model)
                setattr(module, name, changed[id(tensor)][1])
                stand_in = self._stand_ins.get(changed[id(tensor)][1].data_ptr())
                if stand_in is not None:
                    held[name] = stand_in
            if held:
                _widen_in_calls(module, held)

    def _as(self, dtype: torch.dtype, tensor: torch.Tensor, *, stays: bool) -> torch.Tensor:
        """A stand-in for a large tensor of a file that may stay there, else the tensor in this type."""
        import torch

        parameter = isinstance(tensor, torch.nn.Parameter)
        place = self._place(tensor) if stays and parameter and dtype == torch.float32 else None
        if place is None:
            made = tensor.detach().to(dtype)
            return torch.nn.Parameter(made, requires_grad=tensor.requires_grad) if parameter else made
        # shared, so that a page that is only read belongs to it from then on, and is found
        untouched = torch.frombuffer(mmap.mmap(-1, 4 * tensor.numel()), dtype=dtype).view(tensor.shape)
        made = torch.nn.Parameter(untouched, requires_grad=tensor.requires_grad)
        self._stand_ins[made.data_ptr()] = _StandIn(made, tensor.detach())
        self.files.add(made.data_ptr(), made.nbytes, place)
        return made

    def _place(self, tensor: torch.Tensor) -> Place | None:
        """Where a large tensor of 16 bits stands in a file as it is."""
        import torch

        types = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}
        if tensor.dtype not in types or 4 * tensor.numel() < LARGE or not tensor.is_contiguous():
            return None
        return self.files.place(tensor.data_ptr(), tensor.nbytes, types[tensor.dtype])

    def settled(self, compute: Callable[[], Made]) -> Made:
        """What `compute` gives once all that it reads has its values; it may be called again.

        Raises what it raises.
        """
        while True:
            try:
                made = compute()
            except Exception:
                if not self._fill_what_was_read():
                    raise
            else:
                if not self._fill_what_was_read():
                    return made

    def _fill_what_was_read(self) -> bool:
        """Give the parameters that somebody has read their values; whether there were any."""
        read = touched({address for address, stand_in in self._stand_ins.items() if not stand_in.filled})
        for address in read:
            self._stand_ins[address].fill()
        return bool(read)


def _widen_in_calls(module: torch.nn.Module, held: Mapping[str, _StandIn]) -> None:
    """Let the module have its parameters' values while it is called; not in an export, which puts its own there.

    An embedding has them in 16 bits, and what it picks out of them is widened.
    """
    import torch

    picks = type(module) is torch.nn.Embedding and module.max_norm is None
    lent: dict[str, torch.Tensor] = {}

    def before(_module: Any, _inputs: Any) -> None:
        for name, stand_in in held.items():
            if module._parameters[name] is stand_in.parameter and not stand_in.filled:
                lent[name] = stand_in.stored if picks else stand_in.stored.to(stand_in.parameter.dtype)
                module._parameters[name] = lent[name]  # type: ignore[assignment]  # as good as a Parameter here

    def after(_module: Any, _inputs: Any, output: Any) -> Any:
        if not lent:
            return None
        for name in lent:
            module._parameters[name] = held[name].parameter
        lent.clear()
        return output.to(torch.float32) if picks and output is not None else None

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
