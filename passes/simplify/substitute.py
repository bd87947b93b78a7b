"""Lets a node's result be another tensor: outputs of the graph keep their names, and nobody else notices."""

from __future__ import annotations

from collections.abc import Collection

from llmc.passes.graph import Constant, Node, Tensor, metadata, replace_uses


def may_rename(tensor: Tensor, given_back: Collection[int], made: Collection[int]) -> bool:
    """Whether a tensor may take another name: not an input or an output of a graph, a constant, or from outside.

    `given_back` and `made` are ids of the tensors that any scope gives back, and that the nodes of this one make.
    """
    return not isinstance(tensor, Constant) and id(tensor) in made and id(tensor) not in given_back


def substitute(old: Tensor, new: Tensor, given_back: Collection[int], made: Collection[int], node: Node) -> Node | None:
    """Let all that read `old`, an output of `node`, read `new`; `node` is to be removed by the caller.

    Where `old` is an output of a graph, whatever makes `new` makes it under the name of `old`; where that cannot be,
    the answer is the Identity to put in the node's place.
    """
    if not isinstance(new, Constant):
        new.dtype = old.dtype if new.dtype is None else new.dtype
        new.shape = old.shape if new.shape is None else new.shape
    if id(old) not in given_back:
        replace_uses(old, new)
        return None
    list.clear(old.inputs)
    if may_rename(new, given_back, made):
        producer = new.inputs[0]
        index = next(i for i, tensor in enumerate(producer.outputs) if tensor is new)
        list.__setitem__(producer.outputs, index, old)
        list.append(old.inputs, producer)
        list.clear(new.inputs)
        replace_uses(new, old)
        return None
    identity = Node("Identity", node.name, inputs=[new], outputs=[old])
    metadata(identity).update(metadata(node))
    return identity
