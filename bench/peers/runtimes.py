"""Who else computes the plain networks: eager PyTorch, torch.compile, OpenVINO, ONNX Runtime.

Each takes a plain network with example inputs and gives a function of such inputs. On the CPU all use as many
threads as torch, and float32 throughout; on a GPU eager PyTorch also gets the attention of each of its back
ends, and the compiler tunes its kernels and replays CUDA graphs. What they export or compile goes to
temporary folders.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers.layers import PlainAttention, fused_attention
from bench.subject import Outputs, Plain, answer

Function: TypeAlias = Callable[..., Outputs]
INSTALL = "pip install 'glide-fast[bench]'"


class Unavailable(Exception):  # noqa: N818 (it is no error that a peer cannot do something)
    """Why a peer cannot do a case."""


def eager(plain: Plain) -> Function:
    """PyTorch as it is."""
    return lambda *inputs: answer(plain.module, inputs, gradient=plain.gradient)


def compiled(plain: Plain) -> Function:
    """torch.compile, with the weights frozen into the code where no gradient is asked for."""
    import torch._inductor.config as settings

    function = torch.compile(plain.module)

    def call(*inputs: Tensor) -> Outputs:
        with torch.inference_mode(mode=False), torch.no_grad():
            normal = tuple(each.clone() if each.is_inference() else each for each in inputs)
            return answer(function, normal, gradient=plain.gradient, guard=torch.no_grad)

    if plain.gradient:
        return lambda *inputs: answer(function, inputs, gradient=True)
    with settings.patch(freezing=True):
        call(*plain.inputs)
    return call


def compiled_for_gpu(plain: Plain) -> Function:
    """torch.compile with tuned kernels and CUDA graphs, whose memory is used again: results are copied."""
    function = torch.compile(plain.module, mode="max-autotune" if plain.inputs[0].is_cuda else "default")

    def call(*inputs: Tensor) -> Outputs:
        guard = torch.enable_grad if plain.gradient else torch.no_grad
        with torch.inference_mode(mode=False), guard():
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            outputs = answer(function, inputs, gradient=plain.gradient, guard=torch.no_grad)
            return tuple(each.clone() for each in outputs)

    return call


def with_sdpa(plain: Plain, backend: SDPBackend) -> Function:
    """Eager PyTorch whose attention is that of a back end of scaled_dot_product_attention."""
    module = copy.deepcopy(plain.module)
    changed = [each for each in module.modules() if isinstance(each, PlainAttention)]
    if not changed:
        raise Unavailable("it has no attention of the U-Net's kind")
    for each in changed:
        each.attend = fused_attention

    def call(*inputs: Tensor) -> Outputs:
        with sdpa_kernel(backend):
            return answer(module, inputs, gradient=plain.gradient)

    return call


def openvino(plain: Plain) -> Function:
    """OpenVINO on the CPU, from an exported program."""
    _refuse_gradients(plain)
    try:
        import openvino as runtime
    except ImportError:
        raise Unavailable(f"openvino is not installed ({INSTALL})") from None
    model = runtime.convert_model(_exported(plain))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = runtime.compile_model(model, "CPU", settings).create_infer_request()
    del model

    def call(*inputs: Tensor) -> Outputs:
        results = request.infer([each.numpy() for each in inputs], share_inputs=True, share_outputs=True)
        return tuple(torch.from_numpy(array) for array in results.values())

    return call


def onnx_runtime(plain: Plain) -> Function:
    """ONNX Runtime on the CPU, all its graph optimisations on."""
    _refuse_gradients(plain)
    try:
        import onnxruntime as runtime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed ({INSTALL})") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program = torch.onnx.export(_exported(plain), (), dynamo=True, verbose=False)
        if program is None:
            raise Unavailable("torch.onnx exports nothing")
        program.save(path, external_data=True)
        del program
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.inter_op_num_threads = 1
        settings.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # between the runs, for our turn
        settings.log_severity_level = 3
        session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def call(*inputs: Tensor) -> Outputs:
        given = dict(zip(names, (each.numpy() for each in inputs), strict=True))
        return tuple(torch.from_numpy(array) for array in session.run(None, given))

    return call


_BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
SDPA = tuple(_BACKENDS)
PEERS: dict[str, Callable[[Plain], Function]] = {
    "upstream": eager,
    "upstream, text once": eager,
    "compile": compiled,
    "compile, CUDA graphs": compiled_for_gpu,
    **{name: functools.partial(with_sdpa, backend=backend) for name, backend in _BACKENDS.items()},
    "openvino": openvino,
    "onnxruntime": onnx_runtime,
}


def prepare(name: str, plain: Plain) -> Function:
    """The peer's function, run once.

    Raises:
        Unavailable: with the reason.
    """
    try:
        function = PEERS[name](plain)
        function(*plain.inputs)
    except Unavailable:
        raise
    except Exception as error:  # foreign compilers fail in any way; the report says how
        reason = str(error).strip().splitlines()[:1] or [""]
        raise Unavailable(f"{type(error).__name__}: {reason[0][:200]}") from error
    return function


def forget() -> None:
    """Free what torch.compile keeps for the process."""
    torch._dynamo.reset()


def _refuse_gradients(plain: Plain) -> None:
    if plain.gradient:
        raise Unavailable("it runs inference alone and computes no gradients")


def _exported(plain: Plain) -> Any:
    with torch.no_grad():
        return torch.export.export(plain.module, plain.inputs)
