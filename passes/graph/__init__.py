"""The Graph that passes see: nodes and tensors that know each other, taken from ONNX and given back with nothing lost.

Nothing: metadata, which names the source module of a node, every kind of attribute, and the place of weights on disk.
"""

from __future__ import annotations

from llmc.passes.graph.collector import collector_paused as collector_paused
from llmc.passes.graph.edit import constant_bytes as constant_bytes
from llmc.passes.graph.edit import constant_source as constant_source
from llmc.passes.graph.edit import constant_value as constant_value
from llmc.passes.graph.edit import constants as constants
from llmc.passes.graph.edit import fresh_names as fresh_names
from llmc.passes.graph.edit import load_values as load_values
from llmc.passes.graph.edit import operators as operators
from llmc.passes.graph.edit import outputs_of_scopes as outputs_of_scopes
from llmc.passes.graph.edit import reads as reads
from llmc.passes.graph.edit import remove_nodes as remove_nodes
from llmc.passes.graph.edit import replace_uses as replace_uses
from llmc.passes.graph.edit import rewire as rewire
from llmc.passes.graph.edit import scopes as scopes
from llmc.passes.graph.edit import unlink as unlink
from llmc.passes.graph.file_copy import Wrote as Wrote
from llmc.passes.graph.file_copy import append_region as append_region
from llmc.passes.graph.file_copy import clone as clone
from llmc.passes.graph.file_copy import nobody as nobody
from llmc.passes.graph.functions import DOMAIN as DOMAIN
from llmc.passes.graph.functions import KERNELS as KERNELS
from llmc.passes.graph.functions import is_own as is_own
from llmc.passes.graph.functions import specs as specs
from llmc.passes.graph.inference import infer_missing_shapes as infer_missing_shapes
from llmc.passes.graph.inference import infer_shapes as infer_shapes
from llmc.passes.graph.onnx_export import digest as digest
from llmc.passes.graph.onnx_export import raw_values as raw_values
from llmc.passes.graph.onnx_export import refer as refer
from llmc.passes.graph.onnx_export import to_model as to_model
from llmc.passes.graph.onnx_export import to_node as to_node
from llmc.passes.graph.onnx_export import to_structure as to_structure
from llmc.passes.graph.onnx_file import ALIGNMENT as ALIGNMENT
from llmc.passes.graph.onnx_file import EXTERNAL_FROM as EXTERNAL_FROM
from llmc.passes.graph.onnx_file import append_aligned as append_aligned
from llmc.passes.graph.onnx_file import is_large as is_large
from llmc.passes.graph.onnx_file import linked_file as linked_file
from llmc.passes.graph.onnx_file import save_model as save_model
from llmc.passes.graph.onnx_import import copy_graph as copy_graph
from llmc.passes.graph.onnx_import import from_model as from_model
from llmc.passes.graph.onnx_import import from_structure as from_structure
from llmc.passes.graph.onnx_import import in_standard_operators as in_standard_operators
from llmc.passes.graph.onnx_import import load_model as load_model
from llmc.passes.graph.subgraph import extract as extract
from llmc.passes.graph.subgraph import outer_tensors as outer_tensors
from llmc.passes.graph.tensors import FOUR_BIT as FOUR_BIT
from llmc.passes.graph.tensors import SMALL as SMALL
from llmc.passes.graph.tensors import Array as Array
from llmc.passes.graph.tensors import Constant as Constant
from llmc.passes.graph.tensors import Derived as Derived
from llmc.passes.graph.tensors import FileRegion as FileRegion
from llmc.passes.graph.tensors import Graph as Graph
from llmc.passes.graph.tensors import Node as Node
from llmc.passes.graph.tensors import Shape as Shape
from llmc.passes.graph.tensors import Structure as Structure
from llmc.passes.graph.tensors import Tensor as Tensor
from llmc.passes.graph.tensors import Variable as Variable
from llmc.passes.graph.tensors import Weights as Weights
from llmc.passes.graph.tensors import beginning as beginning
from llmc.passes.graph.tensors import dtype_name as dtype_name
from llmc.passes.graph.tensors import extra_attributes as extra_attributes
from llmc.passes.graph.tensors import loaded as loaded
from llmc.passes.graph.tensors import metadata as metadata
from llmc.passes.graph.tensors import module_in as module_in
from llmc.passes.graph.tensors import module_of as module_of
from llmc.passes.graph.tensors import numpy_dtype as numpy_dtype
from llmc.passes.graph.tensors import onnx_dtype as onnx_dtype
from llmc.passes.graph.tensors import pack_four_bit as pack_four_bit
from llmc.passes.graph.tensors import shape_of as shape_of
from llmc.passes.graph.tensors import stored_bytes as stored_bytes
from llmc.passes.graph.tensors import unpack_four_bit as unpack_four_bit
