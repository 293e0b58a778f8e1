"""Latents and embeddings: what the pipeline's encoders give; resume, processes, damage, other models."""

import gzip
import io
import json
import lzma
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from safetensors.torch import load

from data.encode_images import EncodeImages
from data.image_shards import split_name
from data.image_sources import LeftOut, ShardSource
from data.image_text import decode, read_image_text
from data.latent_shards import NULL_NAME, LatentShards
from data.latents import LatentData
from data.pictures import cover
from data.shards import add_member, flatten_condition
from data.teacher import TrajectoryShards
from denoisers import load_denoiser
from denoisers.encoders import Encoders, load_encoders
from solvers.conditions import condition_tensors, index_condition, map_condition
from tests.image_text import CAPTIONS, image_text_folder, picture, sample_files, write_image_text
from tests.tiny_pipelines import LENGTH, tiny_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sd, sdxl, and others that differ from sd in one part."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("sd", "sdxl"):
        tiny_pipeline(kind).save_pretrained(folder / kind)
    other = tiny_pipeline("sd", seed=1)
    for name in ("vae", "text_encoder"):
        pipe = tiny_pipeline("sd")
        pipe.register_modules(**{name: getattr(other, name)})
        pipe.save_pretrained(folder / f"other-{name}")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return image_text_folder(tmp_path / "images")


def encode(model: Path, images: Path, folder: Path, trainer: dict | None = None, **options) -> EncodeImages:
    module = EncodeImages(str(model), str(images), str(folder), **{"batch_size": 2, "dtype": "float32"} | options)
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    bars = {"enable_progress_bar": False, "use_distributed_sampler": False}
    lightning.Trainer(**settings | bars | (trainer or {})).predict(module, TrajectoryShards(), return_predictions=False)
    return module


@pytest.fixture(scope="module")
def encoded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples in three shards."""
    folder = tmp_path_factory.mktemp("encoded")
    encode(models / "sd", image_text_folder(folder / "images"), folder / "shards")
    return folder / "shards"


@pytest.fixture
def copied(encoded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoded, tmp_path / "copied"))


def expected(pipe, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and embeddings by the pipeline's own parts."""
    pixels = np.stack([cover(Image.open(io.BytesIO(picture(number))), (16, 16)) for number in numbers])
    with torch.no_grad():
        mean = pipe.vae.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent_dist.mean
        text, _ = pipe.encode_prompt([CAPTIONS[number % 3] for number in numbers], "cpu", 1, False)
    return mean * pipe.vae.config.scaling_factor, text


def test_shards_hold_what_the_pipeline_s_encoders_give(encoded: Path) -> None:
    pipe = tiny_pipeline("sd")
    shards = LatentShards(encoded)
    assert (len(shards), shards.sample_shape) == (6, (4, 8, 8))
    order = [4, 0, 5, 1, 0]
    latents, condition = shards.read(order)
    wanted = [value[order] for value in expected(pipe, range(6))]
    torch.testing.assert_close(latents, wanted[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(condition["encoder_hidden_states"], wanted[1], rtol=0, atol=1e-6)
    assert latents.std() > 0.01
    null = condition["null"]["encoder_hidden_states"]
    _, empty = pipe.encode_prompt(["x"], "cpu", 1, True)
    torch.testing.assert_close(null, empty.expand_as(null), rtol=0, atol=1e-6)


def test_shards_are_webdataset_shards(encoded: Path) -> None:
    samples = list(webdataset.WebDataset(str(encoded / "pairs-1.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == ["0003", "0004"]
    tensors = load(samples[1]["safetensors"])
    latents, condition = LatentShards(encoded).read([4])
    assert torch.equal(tensors["latents"], latents[0])
    assert torch.equal(tensors["condition/encoder_hidden_states"], condition["encoder_hidden_states"][0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_storage_of_two_bytes_rounds_once(models: Path, images: Path, encoded: Path, tmp_path: Path, dtype) -> None:
    encode(models / "sd", images, tmp_path / "half", dtype=dtype)
    latents, condition = LatentShards(tmp_path / "half").read(range(6))
    exact, exact_condition = LatentShards(encoded).read(range(6))
    assert latents.dtype == torch.float32
    assert torch.equal(latents, exact.to(getattr(torch, dtype)).float())
    text = condition["encoder_hidden_states"]
    assert torch.equal(text, exact_condition["encoder_hidden_states"].to(getattr(torch, dtype)).float())


def test_xl_has_pooled_embeddings_and_sizes(models: Path, images: Path, tmp_path: Path) -> None:
    encode(models / "sdxl", images, tmp_path / "xl")
    shards, denoiser = LatentShards(tmp_path / "xl"), load_denoiser(models / "sdxl", guidance_scale=3.0)
    shards.check(denoiser)
    latents, condition = shards.read([0, 5])
    assert condition["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert denoiser(latents, torch.tensor(500.0), condition).isfinite().all()
    with pytest.raises(ValueError, match=r"text embeddings of width .* the denoiser takes"):
        shards.check(load_denoiser(models / "sd"))


FAMILIES = ("sdxl", "pixart", "sd3", "flux", "wan", "qwen")
LONGER = {"pixart", "sd3", "flux", "wan", "qwen"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_s_shards_are_what_its_network_is_given(
    kind: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that its decoder turns back, embeddings and the null prompt; no encoder is loaded to train on them."""
    folder = tmp_path / "model"
    tiny_pipeline(kind).save_pretrained(folder)
    described: dict = {"height": 16, "width": 16, "negative_prompt": "bad"}
    described |= {"encode": {"max_sequence_length": 250 if kind == "qwen" else LENGTH}} if kind in LONGER else {}
    described |= {"num_frames": 1} if kind == "wan" else {}
    (folder / "denoiser.yaml").write_text(json.dumps(described))
    encode(folder, images, tmp_path / "out")
    pipe, loaded = tiny_pipeline(kind), load_denoiser(folder, prompts=CAPTIONS, decoder=True)
    monkeypatch.setattr("denoisers.diffusers_load.text_pipeline", lambda *_: pytest.fail("loaded"))
    denoiser = load_denoiser(folder, guidance_scale=3.0)
    latents, condition = data(tmp_path / "out", folder).shards.read([0, 4, 5])
    wanted = index_condition(loaded.conditions, [0, 1, 2])
    for name, value in flatten_condition("", condition).items():
        torch.testing.assert_close(value, flatten_condition("", wanted)[name].to(value.dtype), rtol=0, atol=1e-6)
    assert condition_tensors(condition["null"])
    assert denoiser(latents, torch.tensor(500.0), condition).isfinite().all()
    pixels = np.stack([cover(Image.open(io.BytesIO(picture(number))), (16, 16)) for number in (0, 4, 5)])
    pixels = torch.from_numpy(pixels).float() / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(pixels[:, :, None] if kind in ("wan", "qwen") else pixels).latent_dist.mean
        decoded = torch.cat([pipe.vae.decode(one, return_dict=False)[0] for one in mean.split(1)])
    torch.testing.assert_close(loaded.decode(latents), decoded.reshape(loaded.decode(latents).shape), rtol=0, atol=1e-4)
    assert decoded.std() > 1e-3


def test_a_network_of_longer_videos_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny_pipeline("wan").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pictures are videos of one frame, the model's have .*num_frames: 1 in its"):
        load_encoders(tmp_path)


def test_goes_on_after_a_kill(models: Path, images: Path, encoded: Path, tmp_path: Path) -> None:
    """Killed inside the second shard: the first stays untouched, and the end is the same, byte for byte."""
    folder = tmp_path / "killed"
    child = os.fork()
    if child == 0:
        encoding, batches = EncodeImages.encode, []

        def kill_at_the_third(self, source, left_out):
            for samples in encoding(self, source, left_out):
                yield samples
                batches.append(samples)
                if len(batches) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

        EncodeImages.encode = kill_at_the_third
        encode(models / "sd", images, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(ValueError, match="incomplete"):
        LatentShards(folder)
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.tar")}
    assert list(made) == ["pairs-0.tar"]
    encode(models / "sd", images, folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in made} == made
    for name in ("pairs-0.tar", "pairs-1.tar", "pairs-2.tar", "manifest.json", "skipped.txt", NULL_NAME):
        assert (folder / name).read_bytes() == (encoded / name).read_bytes()
    assert not list(folder.glob(".*"))
    assert len(LatentShards(folder)) == 6


def test_two_processes_share_the_shards(models: Path, images: Path, encoded: Path, tmp_path: Path) -> None:
    encode(models / "sd", images, tmp_path / "two", {"devices": 2, "strategy": "ddp_fork"})
    assert (tmp_path / "two" / "manifest.json").read_text() == (encoded / "manifest.json").read_text()
    for path in encoded.glob("*.tar"):
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_another_run_s_folder_is_refused(models: Path, images: Path, encoded: Path) -> None:
    with pytest.raises(ValueError, match=r"holds shards with another dtype: found \"float32\", asked for \"float16\""):
        encode(models / "sd", images, encoded, dtype="float16")
    with pytest.raises(ValueError, match="holds shards with another text_dtype"):
        encode(models / "sd", images, encoded, text_dtype="bfloat16")
    with pytest.raises(ValueError, match="holds shards with another encoders"):
        encode(models / "other-vae", images, encoded)
    write_image_text(images / "pairs-9.tar", {"a": sample_files(0)})
    with pytest.raises(ValueError, match="holds shards with another sources"):
        encode(models / "sd", images, encoded)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("encode: {lora_scale: 1.0}", "options"),
        ("negative_prompt: bad", "negative_prompt"),
        ("{height: 32, width: 32}", "sample_shape"),
    ],
)
def test_another_description_s_folder_is_refused(
    models: Path, images: Path, encoded: Path, tmp_path: Path, line: str, name: str
) -> None:
    described = {"path": str(models / "sd"), **yaml.safe_load(line)}
    (tmp_path / "denoiser.yaml").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"holds shards with another {name}"):
        encode(tmp_path, images, encoded)


def test_a_finished_shard_that_was_altered_is_named_on_resuming(models: Path, images: Path, copied: Path) -> None:
    content = bytearray((copied / "pairs-1.tar").read_bytes())
    content[1000] ^= 1
    (copied / "pairs-1.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs-1\.tar is corrupt.*delete it and pairs-1\.json, then encode again"):
        encode(models / "sd", images, copied)


def test_what_cannot_be_used_is_named_and_too_much_of_it_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {f"{k:04d}": sample_files(k) for k in range(8)}
    samples["0001"]["png"] = samples["0001"]["png"][:60]
    del samples["0002"]["txt"], samples["0003"]["png"]
    samples["0005"] |= {"txt": "Gürteltier".encode("latin-1")}
    samples["0006"] |= {"png": b""}
    samples["x" * 89] = sample_files(0)
    write_image_text(tmp_path / "images" / "a.tar", samples)
    images, folder = tmp_path / "images", tmp_path / "out"
    with pytest.raises(ValueError, match=r"6 of 9 samples were left out, more than max_skipped 0\.6 allows, see .*txt"):
        encode(models / "sd", images, folder, max_skipped=0.6)
    with pytest.raises(ValueError, match="incomplete"):
        LatentShards(folder)
    capsys.readouterr()
    monkeypatch.setattr(EncodeImages, "encode", lambda *_: pytest.fail("encoded twice"))
    encode(models / "sd", images, folder, max_skipped=0.7)
    assert "3 pictures in" in (summary := capsys.readouterr().err.strip().splitlines()[-1])
    assert "6 left out: a.tar: sample 0001: it cannot be read" in summary
    notes = (folder / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert [note.split(": ")[1].split()[1] for note in notes] == ["0001", "0002", "0003", "0005", "0006", "x" * 89]
    reasons = ["cannot be read", "no caption (.txt, or caption in .json), only png, json"]
    reasons += ["no picture (.jpg, .png, ...)", "text is not UTF-8", "an empty file", "name is longer than 88 bytes"]
    assert all(reason in note for reason, note in zip(reasons, notes, strict=True))
    shards = LatentShards(folder)
    assert (len(shards), shards.records["a.tar"]["skipped"]) == (3, 6)
    wanted, _ = expected(tiny_pipeline("sd"), range(8))
    torch.testing.assert_close(shards.read([0, 1, 2])[0], wanted[[0, 4, 7]], rtol=0, atol=1e-6)


def test_names_that_are_no_text_are_stored_and_named_in_one_line(models: Path, tmp_path: Path) -> None:
    """Bytes of another encoding, a line break; and the hidden files that macOS packs between those of a sample."""
    samples = {"a\udcfc": sample_files(0), "b\udcfc\nb": {"png": b""}, "c": sample_files(1)}
    path = write_image_text(tmp_path / "images" / "a.tar", samples)
    hidden = {f"c/.{kind}": content for kind, content in sample_files(2).items()}
    files = {"c/1.png": picture(2), "c/._1": b"", "c/1.txt": b"tree", **hidden}
    with tarfile.open(path, "a") as archive:
        for name, content in files.items():
            add_member(archive, name, content)
    encode(models / "sd", path.parent, tmp_path / "out", max_skipped=0.25)
    shards = LatentShards(tmp_path / "out")
    assert len(shards) == 3
    assert (tmp_path / "out" / "skipped.txt").read_text() == "a.tar: sample b\\udcfc b: an empty file\n"
    wanted, _ = expected(tiny_pipeline("sd"), range(3))
    torch.testing.assert_close(shards.read(range(3))[0], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.xz"])
def test_whatever_is_damaged_is_one_line(tmp_path: Path, kind: str) -> None:
    whole = image_text_folder(tmp_path, (3,)) / "pairs-0.tar"
    pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.xz": lzma.compress}[kind]
    content, random = pack(whole.read_bytes()), np.random.default_rng(0)
    for place in random.integers(0, len(content), 20):
        (tmp_path / f"a.{kind}").write_bytes(content[:place] + b"\x5a" * 40 + content[place + 40 :])
        left_out = LeftOut()
        found = list(ShardSource(tmp_path / f"a.{kind}").samples(left_out))
        assert len(found) <= 4
        assert not any("\n" in note for note in left_out.notes)
        assert left_out.is_cut == bool(left_out.notes)


@pytest.mark.parametrize("damage", ["data", "header", "marker"])
def test_a_damaged_shard_keeps_its_whole_samples(models: Path, tmp_path: Path, damage: str) -> None:
    path = image_text_folder(tmp_path / "images", (3,)) / "pairs-0.tar"
    content = bytearray(path.read_bytes())
    third = content.index(b"0002.png")
    if damage == "header":
        content[third : third + 4] = b"9999"
    path.write_bytes(content[: {"data": third + 700, "marker": third, "header": len(content)}[damage]])
    left_out = LeftOut()
    batches = list(read_image_text(ShardSource(path), (16, 16), 2, left_out))
    assert [key for batch in batches for key in batch.keys] == ["0000", "0001"]
    assert (len(left_out.notes), left_out.is_cut) == (1, True)
    assert "shard pairs-0.tar is corrupt" in left_out.notes[0]
    if damage == "data":
        with pytest.raises(ValueError, match="1 of 1 shards are cut off"):
            encode(models / "sd", path.parent, tmp_path / "out")
        encode(models / "sd", path.parent, tmp_path / "out", max_skipped=1.0)
        assert len(LatentShards(tmp_path / "out")) == 2
        assert LatentShards(tmp_path / "out").records["pairs-0.tar"]["skipped"] == 0


def test_threads_change_nothing_and_a_log_tells_the_time_left(
    models: Path, images: Path, encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    encode(models / "sd", images, tmp_path / "out", workers=1)
    lines = capsys.readouterr().err.splitlines()
    assert any(
        re.match(r"pairs-1: 2 of 3 shards, 5 pictures, [\d.]+ a second, 0 left out, 00:\d\d left", line)
        for line in lines
    )
    assert lines[-1] == f"6 pictures in {tmp_path / 'out'}, 0 left out"
    for path in encoded.glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_files_of_a_folder_are_encoded_as_shards_are(models: Path, tmp_path: Path, encoded: Path) -> None:
    """Captions beside the pictures, in a table with a byte-order mark, or in NAME.json; hidden files are not seen."""
    images = tmp_path / "images"
    for number in range(6):
        (images / f"{number // 3}").mkdir(parents=True, exist_ok=True)
        (images / f"{number // 3}" / f"{number:04d}.png").write_bytes(picture(number))
    (images / ".hidden.png").touch()
    (images / "0" / "0000.txt").write_text(CAPTIONS[0], encoding="utf-16")
    (images / "0" / "0001.json").write_text(json.dumps({"caption": CAPTIONS[1]}), encoding="utf-8-sig")
    rows = [f"{number // 3}/{number:04d}.png,{CAPTIONS[number % 3]}" for number in range(2, 6)]
    (images / "metadata.csv").write_text("file_name,text\r\n" + "\r\n".join(rows), encoding="utf-8-sig")
    encode(models / "sd", images, tmp_path / "out", captions=str(images / "metadata.csv"), shard_size=4)
    shards = LatentShards(tmp_path / "out")
    assert {name: record["samples"] for name, record in shards.records.items()} == {
        "shard-00000.tar": 4,
        "shard-00001.tar": 2,
    }
    for found, wanted in zip(shards.read(range(6)), LatentShards(encoded).read(range(6))):
        found, wanted = (
            one if isinstance(one, torch.Tensor) else one["encoder_hidden_states"] for one in (found, wanted)
        )
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    (images / "0" / "0009.png").write_bytes(picture(9))
    with pytest.raises(ValueError, match="holds shards with another sources"):
        encode(models / "sd", images, tmp_path / "out", captions=str(images / "metadata.csv"), shard_size=4)


def test_of_several_pictures_it_is_the_most_usual_kind() -> None:
    files = {kind: picture(number, (16, 16)) for number, kind in enumerate(("webp", "png", "jpeg"))}
    pixels, caption = decode("a", files | {"txt": b" a cat\n"}, (16, 16))
    assert np.array_equal(pixels, cover(Image.open(io.BytesIO(files["jpeg"])), (16, 16)))
    assert caption == "a cat"


def test_text_encoders_alone_are_made_small(models: Path) -> None:
    encoders = load_encoders(models / "sd", torch.bfloat16)
    dtypes = {name: next(part.parameters()).dtype for name, part in encoders.parts.items()}
    assert dtypes == {"vae": torch.float32, "text_encoder": torch.bfloat16}


def test_keys_and_extensions_are_webdataset_s() -> None:
    assert split_name("a.b/0001.seg.PNG") == ("a.b/0001", "seg.png")
    assert split_name("0001.jpg") == ("0001", "jpg")


def data(folder: Path, model: Path | None = None, **options) -> LatentData:
    """Set up and checked against a model."""
    module = LatentData(str(folder), **{"batch_size": 2} | options)
    module.setup("fit")
    if model is not None:
        module.check(load_denoiser(model))
    return module


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_an_epoch_show_each_sample_once(encoded: Path, models: Path, num_workers: int) -> None:
    module = data(encoded, models / "sd", num_workers=num_workers)
    everything, condition = LatentShards(encoded).read(range(6))
    seen = []
    for latents, given in module.train_dataloader():
        distances = torch.cdist(latents.flatten(1), everything.flatten(1))
        index = distances.argmin(1)
        assert torch.equal(latents, everything[index])
        assert torch.equal(given["encoder_hidden_states"], condition["encoder_hidden_states"][index])
        assert given["null"]["encoder_hidden_states"].shape == given["encoder_hidden_states"].shape
        seen += index.tolist()
    assert sorted(seen) == list(range(6))
    assert module.origin() == {"data": "6 pictures with captions, shards, encoded by sd"}


def test_embeddings_that_are_no_numbers_are_refused(
    models: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5 overflows in float16."""
    encoding = Encoders.encode_prompts
    monkeypatch.setattr(
        Encoders, "encode_prompts", lambda *args: map_condition(lambda value: value / 0, encoding(*args))
    )
    with pytest.raises(
        ValueError, match=r"condition/encoder_hidden_states of 0000, 0001, .* of pairs-0 are not finite"
    ):
        encode(models / "sd", images, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_prompts_encoded_with_other_options_are_refused(encoded: Path, models: Path, tmp_path: Path) -> None:
    (tmp_path / "denoiser.yaml").write_text(f"path: {models / 'sd'}\nencode: {{clip_skip: 1}}\n")
    with pytest.raises(ValueError, match=r"encoded with the options \{\}, the denoiser's are \{'clip_skip': 1\}"):
        data(encoded, tmp_path)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_shards_of_other_encoders_are_refused(encoded: Path, models: Path, part: str) -> None:
    with pytest.raises(ValueError, match=rf"was encoded with another {part}: weights \w{{12}} of sd, .*other-{part}"):
        data(encoded, models / f"other-{part}")


def test_the_dtype_of_the_model_makes_no_other_encoder(encoded: Path, models: Path) -> None:
    LatentShards(encoded).check(load_denoiser(models / "sd", dtype="bfloat16"))


def test_latents_of_another_shape_are_refused(encoded: Path, models: Path) -> None:
    with pytest.raises(ValueError, match=r"latents of shape \(4, 8, 8\), the denoiser takes \(4, 16, 16\)"):
        LatentShards(encoded).check(load_denoiser(models / "sd", height=32, width=32))


def test_missing_embeddings_are_one_clear_error(copied: Path) -> None:
    (copied / NULL_NAME).unlink()
    with pytest.raises(ValueError, match="embeddings of the empty prompt, is missing: delete it and encode again"):
        data(copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["encoded"]["tensors"]["condition/encoder_hidden_states"]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="hold no text embeddings, only latents"):
        data(copied)


@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_corrupt_shard_is_named_and_skipped_only_when_asked_for(copied: Path, damage: str) -> None:
    path = copied / "pairs-1.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content if damage == "altered" else content[:-512])
    if damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=r"shard .*pairs-1\.tar (has|is) .*skip_corrupt: true"):
        data(copied)
    module = data(copied, skip_corrupt=True)
    assert len(module.shards) == 4
    assert "pairs-1.tar" in module.shards.notes[0]
    wanted, _ = expected(tiny_pipeline("sd"), range(6))
    torch.testing.assert_close(module.shards.read([2, 3])[0], wanted[[2, 5]], rtol=0, atol=1e-6)


class Counting(lightning.LightningModule):
    """Trains nothing; each process notes how many samples it has."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight, self.folder = torch.nn.Parameter(torch.zeros(())), folder

    def training_step(self, batch, batch_idx):
        (self.folder / f"rank-{self.global_rank}").write_text(str(len(self.trainer.datamodule.shards)))
        return self.weight * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_processes_leave_out_the_same_shards(copied: Path, tmp_path: Path) -> None:
    """Each checks a share of the checksums, and is told what the others found."""
    path = copied / "pairs-1.tar"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    settings = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork", "max_steps": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    trainer = lightning.Trainer(**settings | quiet, enable_model_summary=False)
    trainer.fit(Counting(tmp_path), datamodule=LatentData(str(copied), batch_size=2, skip_corrupt=True))
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]


def test_a_damaged_shard_is_made_again(models: Path, images: Path, copied: Path, encoded: Path) -> None:
    (copied / "pairs-1.tar").unlink()
    (copied / NULL_NAME).unlink()
    encode(models / "sd", images, copied)
    assert (copied / "pairs-1.tar").read_bytes() == (encoded / "pairs-1.tar").read_bytes()
    assert len(data(copied).shards) == 6


def test_refusals(models: Path, images: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image-text shards \*\.tar\* and no files in .*none"):
        EncodeImages(str(models / "sd"), str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="precision is bf16-true: encode with one of 32-true, bf16-mixed, 16-mixed"):
        encode(models / "sd", images, tmp_path / "out", {"precision": "bf16-true"})
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        EncodeImages(str(models / "sd"), str(images), str(tmp_path / "out"), dtype="int8")
    with pytest.raises(ValueError, match="batch_size 0, workers 4 and shard_size 1000 must be at least 1"):
        EncodeImages(str(models / "sd"), str(images), str(tmp_path / "out"), batch_size=0)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        LatentData(str(copied), batch_size=0)
    with pytest.raises(ValueError, match="holds no encoded shards"):
        LatentShards(tmp_path / "none")
    write_image_text(images / "pairs-0.tar.gz.tar", {"a": sample_files(0)})
    with pytest.raises(ValueError, match="4 shards to encode with 3 names"):
        encode(models / "sd", images, tmp_path / "out")
    for path in copied.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no sample of .* is left"):
        LatentShards(copied, skip_corrupt=True)
    (copied / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="lacks encoded, complete, shards: delete the folder and encode again"):
        LatentShards(copied)
    for name in ("../shard-00000.tar", "/etc/passwd", ".."):
        manifest = {"format_version": 1, "encoded": {}, "complete": True, "shards": {name: {}}}
        (copied / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="shards lie beside their manifest"):
            LatentShards(copied)
    (copied / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        LatentShards(copied)


def test_encoders_of_another_kind_or_in_part_are_refused(models: Path, tmp_path: Path) -> None:
    tiny_pipeline("dit").save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="DiTPipeline cannot be encoded for: use a folder of StableDiffusionPipeline"):
        load_encoders(tmp_path / "dit")
    shutil.copytree(models / "sd", tmp_path / "part")
    (tmp_path / "part" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the encoders of .*part cannot be loaded"):
        load_encoders(tmp_path / "part")


def test_the_size_is_that_of_the_description(models: Path, tmp_path: Path) -> None:
    (tmp_path / "denoiser.yaml").write_text(f"path: {models / 'sd'}\nheight: 32\nwidth: 24\n")
    encoders = load_encoders(tmp_path)
    assert encoders.sample_shape == load_denoiser(tmp_path).sample_shape == (4, 16, 12)
    assert encoders.pixels == (32, 24)
