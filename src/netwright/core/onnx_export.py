"""One self-contained ONNX file from a model, as small as it can be without changing what it computes."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from netwright.core import fake_quantize, onnx_codebooks, onnx_narrow, onnx_quantized, onnx_sparse, onnx_weight_only
from netwright.core.data import Inputs
from netwright.core.errors import ArtifactError
from netwright.core.files import atomic_write
from netwright.core.graph.export import ARGUMENT, export_model

__all__ = ["OUTPUTS_KEY", "export_onnx", "input_names", "output_names"]

OUTPUTS_KEY = "outputs"
"""Metadata key of a file that returns a tuple (its value is ``"tuple"``) or a dict (its keys as a JSON list).

Where the model returns None beside its tensors, such as a loss that was not asked for, it is a JSON object: ``keys``,
that list, or null for a tuple, and ``none``, the positions of None in order.
"""

_LIMIT = 2**31 - 2**20  # a protobuf message holds less than 2 GiB
_NARROW = 6  # bits of the widest integers that are packed; 7 bits would save an eighth and hide 8-bit kernels' weights


def export_onnx(model: nn.Module | ExportedProgram, inputs: Inputs, path: str | Path) -> None:
    """Write ``model`` to ``path`` as one ONNX file with a dynamic batch dimension.

    Reach for it whenever a model is to run outside torch. Only operators of the standard ONNX domain are used,
    so any runtime loads the file. Constants are folded, batch norms are folded into the convolutions before them,
    and names, documentation and metadata of no use to a runtime are dropped. Fake-quantized models become
    integer ones: see :mod:`netwright.core.onnx_quantized`. Integer weights of at most 6 bits, weights that take few
    values and weights with many zeros are stored smaller: see :mod:`netwright.core.onnx_narrow`,
    :mod:`netwright.core.onnx_codebooks` and :mod:`netwright.core.onnx_sparse`.

    Inputs are named after the arguments of ``forward`` (or the keys of ``inputs``); the outputs ``output``,
    ``output_0``, ``output_1``, ... or the keys of the dict that is returned, with ``_out`` behind where an input has
    that name. Where it returns None beside them, the file's metadata says so.

    Args:
        model: any module that ``torch.export`` traces, or its trace by
            :func:`netwright.core.graph.export.export_model`, which saves tracing it again.
        inputs: a batch to trace with; not looked at when ``model`` is a trace.
        path: the file to write; it appears whole or not at all.

    Raises:
        TraceError: a model that cannot be traced.
        ArtifactError: an operation that has no ONNX counterpart, an output that is neither a tensor nor None, weights
            of 2 GiB or more, or a path that cannot be written.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(torch.nn.Linear(3, 2), torch.zeros(1, 3), folder + "/model.onnx")
        ...     [node.op_type for node in onnx.load(folder + "/model.onnx").graph.node]
        ['Gemm']

    Cost: a trace and a second or so for a small network; time grows with the number of operations, memory is
    about three times the weights.
    """
    program = model if isinstance(model, ExportedProgram) else export_model(model, inputs)
    names = input_names(program), output_names(program)
    proto = _convert(program)
    onnx_codebooks.compute_lookups(proto)
    onnx_quantized.spatial_means_to_pools(proto)
    onnx_quantized.store_integers(proto)
    onnx_quantized.drop_unused(proto.graph)
    _check_size(max(_weight_sizes(proto), default=0))  # what the steps below could not copy
    onnx_narrow.store_narrow(proto, _NARROW)
    onnx_weight_only.dequantize_at_load(proto)
    onnx_codebooks.store_codebooks(proto)
    onnx_sparse.store_sparse(proto)
    _name_interface(proto, *names)
    _strip(proto)
    _check_size(sum(_weight_sizes(proto)))  # protobuf does not count beyond its limit
    _check_size(proto.ByteSize())
    with atomic_write(Path(path), ArtifactError) as place:
        place.write_bytes(proto.SerializeToString())


def input_names(program: ExportedProgram) -> list[str]:
    """Names of the tensors that a traced model takes, in order; in lower case, joined by underscores, where nested."""
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    noted = {node.name: node.meta.get(ARGUMENT, node.name) for node in program.graph.nodes if node.op == "placeholder"}
    names = [str(noted.get(arg.name, arg.name)) for arg in given]
    spec = program.call_spec.in_spec
    if spec is not None:
        _, kwargs = pytree.tree_unflatten(list(range(len(given))), spec)
        for key, position in kwargs.items():
            if isinstance(position, int):
                names[position] = key
    return [name for name, arg in zip(names, given, strict=True) if isinstance(arg, TensorArgument)]


def output_names(program: ExportedProgram) -> tuple[list[str], str]:
    """Names of the tensors that a traced model returns, and their form: "tensor", or what :data:`OUTPUTS_KEY` says.

    Raises:
        ArtifactError: an output that is neither a tensor nor None.
    """
    given = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    spec = program.call_spec.out_spec
    inputs = input_names(program)
    if spec is None or spec.is_leaf():
        return _beside(inputs, ["output"]), "tensor"
    constants = {position: arg.value for position, arg in enumerate(given) if isinstance(arg, ConstantArgument)}
    other = [value for value in constants.values() if value is not None]
    if other:
        raise ArtifactError(f"The model returns {other[0]!r}. Only tensors and None can be written as ONNX.")
    sample = pytree.tree_unflatten(list(range(len(given))), spec)
    keys, form = None, "tuple"
    names = [f"output_{position}" for position in range(len(given))]
    if isinstance(sample, Mapping) and all(isinstance(value, int) for value in sample.values()):
        names = keys = [str(key) for key in sample]
        form = json.dumps(keys)
    names = _beside(inputs, names)
    if constants:
        form = json.dumps({"keys": keys, "none": list(constants)})
    return [name for position, name in enumerate(names) if position not in constants], form


def _beside(inputs: list[str], outputs: list[str]) -> list[str]:
    """Names of outputs, with ``_out`` behind those that would stand for two things."""
    names = list(outputs)
    for position, name in enumerate(outputs):
        while names[position] in (*inputs, *names[:position]) or names[position] in set(outputs) - {name}:
            names[position] += "_out"
    return names


def _weight_sizes(proto: Any) -> list[int]:
    return [len(item.raw_data) for item in proto.graph.initializer]


def _check_size(size: int) -> None:
    if size >= _LIMIT:
        raise ArtifactError(
            f"The ONNX file would hold {size / 2**30:.1f} GiB; a single file holds less than 2. Quantize or prune the "
            "model first."
        )


def _convert(program: ExportedProgram) -> Any:
    try:
        with _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=True,
                external_data=False,
                custom_translation_table=fake_quantize.translations(),
            )
            assert converted is not None
            return converted.model_proto
    except Exception as error:  # the exporter raises dozens of types; whichever it is, the user needs its reason
        raise ArtifactError(f"The model cannot be written as ONNX: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of the error at the root, which names the operation that has no counterpart."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:400]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing printed, logged or warned by the exporter."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_interface(proto: Any, inputs: list[str], outputs: tuple[list[str], str]) -> None:
    graph = proto.graph
    names, form = outputs
    if len(inputs) != len(graph.input) or len(names) != len(graph.output):
        raise ArtifactError(
            f"The traced model takes {len(inputs)} tensors and returns {len(names)}, but its ONNX form takes "
            f"{len(graph.input)} and returns {len(graph.output)}. Arguments that are not tensors cannot be exported."
        )
    keep = dict(zip([value.name for value in graph.input], inputs, strict=True))
    del proto.metadata_props[:]
    if form != "tensor":
        onnx.helper.set_model_props(proto, {OUTPUTS_KEY: form})
    _rename(graph, keep, names)


def _rename(graph: Any, inputs: dict[str, str], outputs: list[str]) -> None:
    """Short names for everything inside, the given ones for what a caller sees."""
    taken = {"", *inputs.values(), *outputs}
    counter = iter(range(10**9))

    def fresh() -> str:
        name = next(text for text in (_short(number) for number in counter) if text not in taken)
        taken.add(name)
        return name

    names: dict[str, str] = {"": "", **inputs}
    for value, new in zip(graph.output, outputs, strict=True):
        if value.name in names:  # an input, or one tensor returned twice
            graph.node.append(onnx.helper.make_node("Identity", [value.name], [f"identity:{new}"]))
            names[f"identity:{new}"] = new
        else:
            names[value.name] = new
        value.name = new
    _apply(graph, names, fresh)


def _apply(graph: Any, names: dict[str, str], fresh: Callable[[], str]) -> None:
    def short(name: str) -> str:
        if name not in names:
            names[name] = fresh()
        return names[name]

    for value in (*graph.input, *graph.initializer):
        value.name = short(value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for position, name in enumerate(field):
                field[position] = short(name)
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                _apply(inner, names, fresh)
                for value in inner.output:
                    value.name = short(value.name)


def _strip(proto: Any) -> None:
    """Drop what no runtime reads."""
    proto.ClearField("doc_string")
    proto.producer_name, proto.producer_version = "", ""
    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    _strip_graph(proto.graph, version)
    proto.graph.name = "netwright"


def _strip_graph(graph: Any, version: int) -> None:
    for field in ("value_info", "metadata_props", "doc_string", "quantization_annotation"):
        graph.ClearField(field)
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("name")
        _strip_defaults(node, version)
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for inner in _graphs(attribute):
                _strip_graph(inner, version)


def _strip_defaults(node: Any, version: int) -> None:
    """Drop attributes that say what their absence says."""
    known = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
    kept = [item for item in node.attribute if not _is_default(item, known[item.name].default_value)]
    del node.attribute[:]
    node.attribute.extend(kept)


def _is_default(attribute: Any, default: Any) -> bool:
    if default.type == onnx.AttributeProto.UNDEFINED or attribute.type != default.type:
        return False
    return bool(onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(default))


def _graphs(attribute: Any) -> list[Any]:
    """The sub-graphs in an attribute, as of ``If`` and ``Loop``."""
    return [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def _short(number: int) -> str:
    digits = "abcdefghijklmnopqrstuvwxyz"
    text = digits[number % 26]
    while number := number // 26:
        text += digits[number % 26]
    return text
