"""How fast pictures with captions are read, and what encoding costs beside the encoders.

Pictures per processor second of one thread: decoded, scaled and cut, from photographs of several sizes. With a model,
its shards are made by the command's own module, and the calls of the encoders are timed from inside, so that
`throughput_fraction` is their share of the whole. On a CPU times are processor seconds on one thread, so other work
does not disturb them; on a GPU they are wall-clock seconds. The last line is one JSON object.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.encode_images import EncodeImages
from data.image_text import decode
from data.shards import add_member
from data.teacher import TrajectoryShards
from training.arguments import guarded

SIDES = ((512, 512), (1024, 1024), (3000, 4000))


def photograph(height: int, width: int, seed: int = 0) -> bytes:
    """A JPEG file as smooth as photographs are: about 0.2 bytes a pixel."""
    rough = np.random.default_rng(seed).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = np.random.default_rng(seed + 1).integers(-6, 7, smooth.shape, dtype=np.int16)
    content = io.BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def decoding(side: int) -> dict[str, float]:
    """Pictures per processor second by the size of the file, for pictures of `side` pixels."""
    found = {}
    for height, width in SIDES:
        files = {"jpg": photograph(height, width), "txt": b"a photograph"}
        decode("0", files, (side, side))
        count, start = 0, time.process_time()
        while time.process_time() < start + 2:
            decode("0", files, (side, side))
            count += 1
        found[f"{width} x {height}, {len(files['jpg']) // 1000} kB"] = count / (time.process_time() - start)
    return found


class Timed:
    """Adds up how long calls of a function take."""

    def __init__(self, function: Callable[..., Any], device: str) -> None:
        self.function, self.device, self.seconds = function, device, 0.0

    def __call__(self, *args: Any) -> Any:
        start = self.now(time.thread_time)
        found = self.function(*args)
        self.seconds += self.now(time.thread_time) - start
        return found

    def now(self, clock: Callable[[], float] = time.process_time) -> float:
        """Seconds: on a CPU those of the thread or the process, else wall-clock."""
        if self.device == "cpu":
            return clock()
        torch.cuda.synchronize()
        return time.perf_counter()


def encoding(model: str, device: str, pictures: int, batch_size: int, precision: str) -> dict[str, float]:
    """Pictures a second, and the share of the encoders in it."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(Path(folder) / "pictures.tar", "w") as archive:
            content = photograph(512, 512)
            for index in range(pictures):
                add_member(archive, f"{index:05d}.jpg", content)
                add_member(archive, f"{index:05d}.txt", b"a photograph of something")
        module = EncodeImages(model, folder, f"{folder}/out", "*.tar", batch_size=batch_size, workers=1)
        parts = [Timed(getattr(module.encoders, name), device) for name in ("encode_images", "encode_prompts")]
        module.encoders.encode_images, module.encoders.encode_prompts = parts  # type: ignore[method-assign]
        settings: dict[str, Any] = {"accelerator": device, "devices": 1, "precision": precision, "logger": False}
        settings |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer, making = lightning.Trainer(**settings), Timed(module.predict_step, device)
        module.predict_step = lambda *args: _process(making, *args)  # type: ignore[method-assign]
        trainer.predict(module, TrajectoryShards(), return_predictions=False)
    images, prompts = (part.seconds / making.seconds for part in parts)
    return {
        "pictures_per_second": pictures / making.seconds,
        "autoencoder_share": images,
        "text_encoder_share": prompts,
        "throughput_fraction": images + prompts,
    }


def _process(making: Timed, *args: Any) -> Any:
    """Count the threads that read and write, too."""
    start = making.now()
    found = making.function(*args)
    making.seconds += making.now() - start
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; default: decoding alone")
    parser.add_argument("--size", type=int, default=512, help="of the pictures that are decoded")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"decoded_per_second": decoding(options.size)}
    if options.model:
        found |= encoding(options.model, options.device, options.pictures, options.batch_size, options.precision)
    print(json.dumps(found))


if __name__ == "__main__":
    guarded(main)
