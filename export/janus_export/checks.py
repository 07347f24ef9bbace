"""What export adds to the contracts of a model's parts: announced as checks, run by ``plugins check``.

    [project.entry-points."janus_modular.checks"]
    onnx_parity = "janus_export.checks:check_onnx_parity"
    rtx_engine = "janus_export.checks:check_rtx_engine"

A part is exported as it is, call by call; a whole model's graphs are `janus_export.verify`'s.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from janus_modular.errors import MissingExtraError, missing_extra
from janus_modular.registry import MODEL_SLOTS
from janus_modular.testing.check import NotApplicable, check_for, ensure


@check_for(*MODEL_SLOTS)
def check_onnx_parity(component: Any, example: Any) -> None:
    """As standard ONNX, ONNX Runtime computes what torch does."""
    import torch

    from janus_modular.testing.calls import calls_of, tensors
    from janus_modular.testing.comparing import ensure_same

    component.eval().requires_grad_(False)
    for call in calls_of(component, example):
        with torch.no_grad():
            wanted = tensors(call(component))
        found = [torch.from_numpy(x) for x in run_onnx(onnx_of(component, call), tensors(call.inputs))]
        ensure(
            len(found) == len(wanted), f"{call.name}: {len(found)} outputs in ONNX, {len(wanted)} in torch"
        )
        ensure_same(found, wanted, f"{call.name} in ONNX Runtime")


@check_for(*MODEL_SLOTS, slow=True)
def check_rtx_engine(component: Any, example: Any) -> None:
    """TensorRT-RTX builds an engine of it, for which no GPU is needed."""
    from janus_modular.testing.calls import calls_of

    component.eval().requires_grad_(False)
    for call in calls_of(component, example):
        if call.name != "losses":  # of training alone
            build_rtx(onnx_of(component, call))


def build_rtx(model: bytes) -> None:
    """Build an ONNX file's engine for a GPU of compute capability 8.9, and throw it away.

    Raises:
        NotApplicable: TensorRT-RTX, or what lowers graphs for it, is not installed.
        ExportError: TensorRT refuses the graph; says which node or input.
    """
    try:
        from janus_export.targets import find_target, load
        from janus_export.tensorrt_builder import Order, build_engine
        from janus_export.tensorrt_lowering import lower

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
        build_engine(trt, lowered, file, file.with_suffix(".engine"), Order(arch=["8.9"]))


def onnx_of(component: Any, call: Any) -> bytes:
    """Return one call of a component as an ONNX file, weights inside.

    Raises:
        NotApplicable: a package of the extra ``export`` is not installed.
        ExportError: the component does something that no graph can hold.
    """
    try:
        from janus_export.diagnosis import explained
        from janus_export.lowering import all_translations
        from janus_export.to_onnx import OPSET, without_warnings
    except ModuleNotFoundError as error:
        raise NotApplicable(str(missing_extra(error, "ONNX") or error)) from error
    import torch

    from janus_modular.testing.calls import Calling

    with torch.no_grad(), without_warnings(), explained(call.name, component):
        program = torch.onnx.export(
            Calling(component, call).eval(),
            call.inputs,
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
        import onnxruntime
    except ModuleNotFoundError as error:
        raise NotApplicable(str(missing_extra(error, "ONNX Runtime") or error)) from error
    from janus_export.runtimes.onnx_runtime import quiet_options

    try:
        session = onnxruntime.InferenceSession(model, quiet_options(), providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise NotApplicable(f"ONNX Runtime on a CPU: {str(error).splitlines()[0]}") from error
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
