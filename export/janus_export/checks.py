"""Checks that export adds to the contracts of components, registered as entry points for ``plugins check``.

    [project.entry-points."janus_modular.checks"]
    onnx_parity = "janus_export.checks:check_onnx_parity"
    rtx_engine = "janus_export.checks:check_rtx_engine"

A component is exported alone, call by call; `janus_export.verify` checks the graphs of a whole model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from janus_modular.errors import MissingExtraError, missing_extra
from janus_modular.registry import MODEL_SLOTS
from janus_modular.testing.check import NotApplicable, check_for, ensure


@check_for(*MODEL_SLOTS)
def check_onnx_parity(component: Any, example: Any, *, slot: str) -> None:
    """Exported to standard ONNX for any batch size, the component computes the same as in torch."""
    import torch

    from janus_modular.testing.calls import calls_of, enlarged, tensors

    component.eval().requires_grad_(False)
    calls, larger = (calls_of(component, sample, slot) for sample in (example, enlarged(example, slot)))
    for call, larger_call in zip(calls, larger, strict=True):
        if not call.is_exported:
            continue
        with torch.no_grad():
            expected = tensors(larger_call(component))
        _ensure_computes(
            onnx_of(component, call, larger_call), tensors(larger_call.inputs), expected, call.name
        )


@check_for("generation")
def check_drawing_graphs(path: Any, pixels: Any) -> None:
    """The graphs of a path are compiled for any number of images, and compute the same as in torch."""
    try:
        from janus_export.bundle.axes import Ranges
        from janus_export.onnx_export.graphs import drawing_graphs
        from janus_export.onnx_export.trace import faked, to_onnx
    except ModuleNotFoundError as error:
        raise NotApplicable(str(missing_extra(error, "ONNX") or error)) from error
    import onnx_ir as ir
    import torch

    from janus_modular.testing.calls import tensors
    from janus_modular.testing.drawing import graph_inputs, targets_of

    path.eval().requires_grad_(False)
    pixels = torch.cat([pixels, pixels[:1]])  # differs from the number that a graph is traced with
    model = torch.nn.Module()
    model.generation = path
    functions = {graph.name: graph.function for graph in path.graphs()}
    with torch.no_grad():
        inputs = graph_inputs(path, pixels, path.embed(targets_of(path, pixels)).shape[-1])
        expected = {name: tensors(functions[name](*arguments)) for name, arguments in inputs.items()}
    if not inputs:
        raise NotApplicable("its image sampler fails: see generation_sampler")
    graphs = drawing_graphs(model, Ranges.of(context=1024), torch.float32)  # type: ignore[arg-type]
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    mode = faked(model)
    for graph in (graph for graph in graphs if graph.name in inputs):
        onnx = to_onnx(graph, mode)
        for name, value in onnx.graph.initializers.items():
            if (key := name.removeprefix("model.")) in weights:
                value.const_value = ir.tensor(weights[key], name=name)
        file = ir.to_proto(onnx).SerializeToString()
        added = len(graph.outputs) - len(graph.computed)
        arguments = [torch.as_tensor(x) for x in inputs[graph.name]]
        _ensure_computes(file, arguments, expected[graph.name], f"the graph '{graph.name}'", added)


def _ensure_computes(
    model: bytes, inputs: list[Any], expected: list[Any], subject: str, added: int = 0
) -> None:
    """Compare an ONNX file in ONNX Runtime with what torch made of the same inputs.

    The last ``added`` outputs are the export's own, and not compared.
    """
    import torch

    from janus_modular.testing.comparing import ensure_close

    outputs = run_onnx(model, inputs)
    actual = [torch.from_numpy(x) for x in outputs[: len(outputs) - added]]
    ensure(
        len(actual) == len(expected), f"{subject}: {len(actual)} outputs in ONNX, {len(expected)} in torch"
    )
    ensure_close(actual, expected, f"{subject} in ONNX Runtime")


@check_for(*MODEL_SLOTS, slow=True)
def check_rtx_engine(component: Any, example: Any, *, slot: str) -> None:
    """TensorRT-RTX builds an engine of the component; no GPU is needed."""
    from janus_modular.testing.calls import calls_of

    component.eval().requires_grad_(False)
    for call in calls_of(component, example, slot):
        if call.is_exported and call.name != "losses":  # only for training
            build_rtx(
                onnx_of(component, call, call)
            )  # an engine's lengths are its profile's, not the graph's


def build_rtx(model: bytes) -> None:
    """Build an ONNX file's engine for a GPU of compute capability 8.9, and throw it away.

    Raises:
        NotApplicable: TensorRT-RTX, or what lowers graphs for it, is not installed.
        ExportError: TensorRT refuses the graph; says which node or input.
    """
    try:
        from janus_export.tensorrt_build.builder import EngineOptions, build_engine
        from janus_export.tensorrt_build.lowering import lower
        from janus_export.tensorrt_build.targets import find_target, load

        trt = load(find_target("tensorrt-rtx"))
    except MissingExtraError as error:
        raise NotApplicable(str(error)) from error
    except ModuleNotFoundError as error:
        raise NotApplicable(str(missing_extra(error, "lowering for TensorRT") or error)) from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "component.onnx")
        file.write_bytes(model)
        lowered = lower(file, capacity=1)  # a component has no cache
        if not len(lowered.graph):
            raise NotApplicable("it computes nothing")
        build_engine(trt, lowered, file, file.with_suffix(".engine"), EngineOptions(arch=["8.9"]))


def onnx_of(component: Any, call: Any, larger: Any) -> bytes:
    """Return a component's call as an ONNX file with weights; lengths that differ in ``larger`` are dynamic.

    Raises:
        NotApplicable: a package of the extra ``export`` is not installed.
        ExportError: the component cannot be exported.
        CheckError: the call fixes a length that may vary.
    """
    try:
        from janus_export.onnx_export.diagnostics import explained
        from janus_export.onnx_export.trace import OPSET, without_warnings
        from janus_export.onnx_export.translations import all_translations
    except ModuleNotFoundError as error:
        raise NotApplicable(str(missing_extra(error, "ONNX") or error)) from error
    import torch

    from janus_modular.testing.calls import trace_call

    with torch.no_grad():
        graph = trace_call(component, call, larger)
        with without_warnings(), explained(call.name, component):
            program = torch.onnx.export(
                graph,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=all_translations(component),
                optimize=False,  # as in `to_onnx`
                verbose=False,
            )
    assert program is not None
    return program.model_proto.SerializeToString()


def run_onnx(model: bytes, inputs: list[Any]) -> list[Any]:
    """Run an ONNX file on ONNX Runtime, on the CPU.

    Raises:
        NotApplicable: ONNX Runtime is not installed, or has no such operator on a CPU.
    """
    try:
        from janus_export.runtimes.ort.library import onnxruntime
    except ModuleNotFoundError as error:
        raise NotApplicable(str(missing_extra(error, "ONNX Runtime") or error)) from error
    from janus_export.runtimes.ort.runtime import quiet_options

    try:
        session = onnxruntime.InferenceSession(model, quiet_options(), providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise NotApplicable(f"ONNX Runtime on a CPU: {str(error).splitlines()[0]}") from error
    names = [tensor.name for tensor in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
