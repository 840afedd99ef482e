"""Runtimes that run a folder's graphs: named arrays in, arrays out, in the order of the manifest's names."""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .manifest import Manifest

Arrays = list[np.ndarray]
# Runs the graph of this name on these inputs.
Engine = Callable[[str, dict[str, np.ndarray]], Arrays]

# What users write for a provider of onnxruntime, beside its own name.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


def wanted_package(name: str, what: str) -> Any:
    """Import an optional package.

    Raises:
        ValueError: naming it, if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as fault:
        package = name.partition(".")[0]
        raise ValueError(
            f'{what} wants {name}, found none (pip install "efficientsam-hf[export]" {package})'
        ) from fault


def load_graphs(folder: Path, manifest: Manifest, runtime: str, load: Callable[[Path], Any]) -> dict[str, Any]:
    """What a runtime makes of each graph's file, by the graph's name.

    Raises:
        ValueError: for a graph that it refuses: what it was made for, what is here, and the runtime's reason.
    """
    loaded = {}
    for name, graph in manifest.graphs.items():
        path = folder / graph["file"]
        try:
            loaded[name] = load(path)
        except Exception as fault:  # runtimes raise RuntimeError and classes of their own
            made = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
            opset = f" for opset {manifest.opset}" if manifest.opset else ""
            reason = str(fault).strip().splitlines()[0]
            raise ValueError(f"{path}: made{opset} with {made}, and {runtime} cannot load it: {reason}") from fault
    return loaded


def onnx_engine(folder: Path, manifest: Manifest, devices: Sequence[str], threads: int | None) -> Engine:
    """ONNX Runtime. Devices are its execution providers, the first that can does a node: "cuda", "tensorrt", "cpu".

    "cuda:1" is CUDA's second device.
    """
    onnxruntime = wanted_package("onnxruntime", "an ONNX folder")
    available = onnxruntime.get_available_providers()
    fastest = [name for name in ("cuda", "cpu") if PROVIDERS[name] in available]
    asked = [name.partition(":")[::2] for name in devices or fastest]
    providers = [PROVIDERS.get(name.lower(), name) for name, _ in asked]
    places = [{"device_id": place} if place else {} for _, place in asked]
    for provider in providers:
        if provider not in available:
            raise ValueError(f"onnxruntime has no provider {provider} here, found {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0

    def load(path: Path) -> Any:
        return onnxruntime.InferenceSession(str(path), options, providers=providers, provider_options=places)

    sessions = load_graphs(folder, manifest, f"onnxruntime {onnxruntime.__version__}", load)
    for session in sessions.values():
        if devices and providers[0] not in (started := session.get_providers()):
            raise ValueError(f"onnxruntime's {providers[0]} does not start here, found {', '.join(started)}")
    return lambda name, inputs: sessions[name].run(manifest.graphs[name]["outputs"], inputs)


@cache
def openvino_core(wanted_for: str) -> Any:
    """A core of OpenVINO that lives as long as the process.

    A core gives signals a stack in the thread that made it, and takes that memory away in the thread that frees it:
    where these are two, the next signal that Python handles ends the process without a word.
    """
    return wanted_package("openvino", wanted_for).Core()


def openvino_engine(folder: Path, manifest: Manifest, devices: Sequence[str], threads: int | None) -> Engine:
    """OpenVINO. At most one device, as it names them: "cpu", "gpu", "npu", "auto"."""
    core, openvino = openvino_core("an OpenVINO folder"), import_module("openvino")
    if len(devices) > 1:
        raise ValueError(f"OpenVINO takes one device, found {', '.join(devices)}")
    device = (devices[0] if devices else "cpu").upper()
    available = core.available_devices
    if device.partition(".")[0] not in {"AUTO", *(name.partition(".")[0] for name in available)}:
        raise ValueError(f"OpenVINO has no device {device} here, found {', '.join(available)}")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if manifest.dtype == "float32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"  # or some CPUs take bfloat16 without a word
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads

    def load(path: Path) -> Any:
        return core.compile_model(core.read_model(path), device, settings)

    compiled = load_graphs(folder, manifest, f"openvino {openvino.__version__}", load)
    requests = threading.local()  # one that another thread waits for refuses a second question

    def run(name: str, inputs: dict[str, np.ndarray]) -> Arrays:
        own = vars(requests)
        if name not in own:
            own[name] = compiled[name].create_infer_request()
        answers = own[name].infer([inputs[key] for key in manifest.graphs[name]["inputs"]], share_inputs=True)
        return [answers[index] for index in range(len(manifest.graphs[name]["outputs"]))]

    return run


def torch_engine(folder: Path, manifest: Manifest, devices: Sequence[str], threads: int | None) -> Engine:
    """Torch itself, on graphs that `torch.export` saved: no code of the model is needed. On the CPU."""
    if list(devices) not in ([], ["cpu"]):
        raise ValueError(f"a torch-export folder was traced for the CPU, found device {', '.join(devices)}")
    if threads:
        raise ValueError(f"torch has one number of threads for all, found threads={threads}: torch.set_num_threads")
    modules = load_graphs(
        folder, manifest, f"torch {torch.__version__}", lambda path: torch.export.load(path).module()
    )

    @torch.no_grad()
    def run(name: str, inputs: dict[str, np.ndarray]) -> Arrays:
        answers = modules[name](*(torch.from_numpy(inputs[key]) for key in manifest.graphs[name]["inputs"]))
        return [answer.numpy() for answer in (answers if isinstance(answers, tuple) else (answers,))]

    return run


def executorch_engine(folder: Path, manifest: Manifest, devices: Sequence[str], threads: int | None) -> Engine:
    """ExecuTorch's runtime, on the CPU."""
    runtime = wanted_package("executorch.runtime", "an ExecuTorch folder")
    if list(devices) not in ([], ["cpu"]):
        raise ValueError(f"an ExecuTorch folder was written for the CPU, found device {', '.join(devices)}")
    if threads:
        raise ValueError(f"ExecuTorch has one number of threads for all, found threads={threads}")

    def load(path: Path) -> Any:
        return runtime.Runtime.get().load_program(path).load_method("forward")

    methods = load_graphs(folder, manifest, "executorch", load)

    def run(name: str, inputs: dict[str, np.ndarray]) -> Arrays:
        names = manifest.graphs[name]["inputs"]
        return [
            answer.numpy().copy() for answer in methods[name].execute([torch.from_numpy(inputs[key]) for key in names])
        ]

    return run


ENGINES: dict[str, Callable[[Path, Manifest, Sequence[str], int | None], Engine]] = {
    "onnx": onnx_engine,
    "openvino": openvino_engine,
    "torch-export": torch_engine,
    "executorch": executorch_engine,
}


def start_engine(
    folder: Path, manifest: Manifest, devices: Sequence[str] | str | None = None, threads: int | None = None
) -> Engine:
    """The runtime for a folder's format.

    Args:
        folder: With the graphs.
        manifest: The folder's.
        devices: Where to run, as the runtime names it; several for onnxruntime's providers, tried in order.
        threads: On the CPU, of onnxruntime and OpenVINO; the runtime's own choice if None.

    Raises:
        ValueError: if the runtime, or a device, is not installed here, or the runtime cannot load a graph.
    """
    if manifest.format not in ENGINES:
        raise ValueError(f"{folder}: found format {manifest.format!r}, wanted one of {', '.join(ENGINES)}")
    devices = [devices] if isinstance(devices, str) else list(devices or [])
    return ENGINES[manifest.format](folder, manifest, devices, threads)
