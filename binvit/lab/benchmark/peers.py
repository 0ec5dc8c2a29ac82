"""The peers a packed model is measured against: one float model in the forms that people deploy."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], object]


class NotAvailable(Exception):
    """A peer's package or compiler is not installed here."""


def eager(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run timm's model in float32."""
    return _torch(model, images)


def compiled(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run timm's model in float32, compiled by torch."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise NotAvailable("no C++ compiler")
    return _torch(torch.compile(model), images)


def bfloat16(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run timm's model in bfloat16."""
    return _torch(copy.deepcopy(model).bfloat16(), images.bfloat16())


def dynamic_int8(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run timm's model with torch's dynamically quantized linear layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this form will move to another package
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return _torch(quantized, images)


def onnx_float32(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run the exported model in ONNX Runtime."""
    with _exported(model, images) as path:
        return _onnx(path, images, threads)


def onnx_int8(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run the exported model in ONNX Runtime, dynamically quantized."""
    _need("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _exported(model, images) as path:
        small = path.with_name("int8.onnx")
        with _silence():
            quantize_dynamic(path, small, weight_type=QuantType.QInt8)
        return _onnx(small, images, threads)


def openvino_float32(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run the exported model in OpenVINO with float32 arithmetic."""
    return _openvino(model, images, threads, "f32")


def openvino_bfloat16(model: nn.Module, images: Tensor, threads: int) -> Run:
    """Run the exported model in OpenVINO with bfloat16 arithmetic."""
    return _openvino(model, images, threads, "bf16")


PEERS: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    "timm float32": eager,
    "timm float32 compiled": compiled,
    "timm bfloat16": bfloat16,
    "torch dynamic int8": dynamic_int8,
    "ONNX Runtime float32": onnx_float32,
    "ONNX Runtime dynamic int8": onnx_int8,
    "OpenVINO float32": openvino_float32,
    "OpenVINO bfloat16": openvino_bfloat16,
}


def _torch(model: Callable[[Tensor], Tensor], images: Tensor) -> Run:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def _need(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError:
            raise NotAvailable(f"{package} is not installed (pip install binvit[bench])") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep exporters from writing progress and warnings between the lines of a table."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _exported(model: nn.Module, images: Tensor) -> Iterator[Path]:
    _need("onnx", "onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with _silence():
            # The tracing exporter: the newer one needs one more package and gives the same graph here.
            torch.onnx.export(model, (images,), path, dynamo=False, input_names=["images"], opset_version=17)
        yield path


def _onnx(path: Path, images: Tensor, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}
    return lambda: session.run(None, inputs)


@functools.cache
def _openvino_core() -> Any:
    """Return the process's only core: of two, the first to go leaves the second's signal stack without memory."""
    import openvino

    return openvino.Core()


def _openvino(model: nn.Module, images: Tensor, threads: int, precision: str) -> Run:
    _need("openvino")
    with _exported(model, images) as path, _silence():
        core = _openvino_core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    array = images.numpy()
    return lambda: request.infer([array], share_inputs=True)
