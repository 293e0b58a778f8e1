"""Files of the official DiT and SiT code: what its training writes, prefixes, missing tables, no code from files."""

import pathlib
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from denoisers import load_denoiser
from denoisers.dit import DiT
from solvers.schedule import NoiseSchedule
from tests.denoisers.test_dit import inputs, small


def tiny(**options) -> DiT:
    return small(hidden_size=64, num_heads=1, learn_sigma=True, num_classes=7, **options)


def training_checkpoint(network: DiT, **arguments) -> dict:
    """As the official train.py of DiT and SiT writes it."""
    weights = network.state_dict()
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    told = {"model": "DiT-XL/2", "image_size": 64, "num_classes": 7, "data_path": "x", "ckpt": None} | arguments
    last = {name: value + 1 for name, value in weights.items()}
    return {"model": last, "ema": weights, "opt": optimizer.state_dict(), "args": Namespace(**told)}


def check_loads(path, model: DiT, **options) -> DiT:
    loaded = load_denoiser(path, **options)
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    return loaded


@pytest.mark.parametrize("entry", [None, "ema", "model"])
def test_public_pt_files_load(tmp_path, entry):
    model = tiny()
    weights = model.state_dict()
    torch.save(weights if entry is None else {entry: weights, "args": {}}, tmp_path / "DiT-tiny.pt")
    assert check_loads(tmp_path / "DiT-tiny.pt", model).config == model.config


def test_what_the_training_code_writes_loads_whatever_its_name(tmp_path):
    model = tiny()
    torch.save(training_checkpoint(model), tmp_path / "0050000.pt")
    assert check_loads(tmp_path / "0050000.pt", model).schedule == NoiseSchedule.linear()


def test_a_sit_training_checkpoint_gets_its_convention_from_its_arguments(tmp_path):
    model = tiny(schedule=NoiseSchedule.flow(), convention="sit")
    told = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}
    torch.save(training_checkpoint(model, **told), tmp_path / "dit.pt")
    check_loads(tmp_path / "dit.pt", model)
    torch.save(training_checkpoint(model, **told | {"path_type": "GVP"}), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="was trained with path_type GVP: only velocities of the linear path"):
        load_denoiser(tmp_path / "dit.pt")


def test_public_sit_file_gets_its_convention_from_its_name(tmp_path):
    model = small(NoiseSchedule.flow(), convention="sit")
    torch.save(model.state_dict(), tmp_path / "SiT-tiny.pt")
    loaded = check_loads(tmp_path / "SiT-tiny.pt", model, num_heads=4)
    assert loaded.schedule.prediction_type == "flow_prediction"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_dropped(tmp_path, prefix):
    model = tiny()
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "dit.pt")
    check_loads(tmp_path / "dit.pt", model)


def test_compiled_blocks_have_their_prefix_in_the_middle(tmp_path):
    model = tiny()
    names = {name: f"module.{name}".replace("blocks.0.", "blocks.0._orig_mod.") for name in model.state_dict()}
    torch.save({names[name]: value for name, value in model.state_dict().items()}, tmp_path / "dit.pt")
    check_loads(tmp_path / "dit.pt", model)


def test_a_missing_position_table_is_computed(tmp_path):
    model = DiT(NoiseSchedule.linear(), input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=1).eval()
    nn.init.normal_(model.final_layer.linear.weight)
    checkpoint = training_checkpoint(model)
    del checkpoint["ema"]["pos_embed"]
    torch.save(checkpoint, tmp_path / "dit.pt")
    check_loads(tmp_path / "dit.pt", model)
    torch.save(checkpoint["ema"], tmp_path / "dit.pt")
    check_loads(tmp_path / "dit.pt", model, input_size=8)
    with pytest.raises(ValueError, match=r"has no position table, .* pass input_size, a multiple of the patch size 2"):
        load_denoiser(tmp_path / "dit.pt")


def test_safetensors_files_load(tmp_path):
    model = tiny()
    save_file(model.state_dict(), tmp_path / "DiT-tiny.safetensors")
    check_loads(tmp_path / "DiT-tiny.safetensors", model)
    (tmp_path / "DiT-tiny.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_denoiser(tmp_path / "DiT-tiny.safetensors")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"x_embedder.proj.weight": nn.Linear(1, 1)}, "it holds a torch.nn.modules.linear.Linear"),
        ({"ema": {}, "args": Namespace(folder=pathlib.PurePosixPath("x"))}, "it holds a pathlib.PurePosixPath"),
        ({"ema": {}, "args": Namespace(run=pathlib.os.system)}, "it holds a posix.system"),
    ],
)
def test_any_class_but_namespace_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match=f"not a file of plain tensors \\({found}\\)"):
        load_denoiser(tmp_path / "dit.pt")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ({"weight": torch.zeros(2)}, "dit.pt", r"x_embedder\.proj\.weight is missing"),
        (torch.zeros(2), "dit.pt", "holds a Tensor: save the network's state_dict"),
        ({"x_embedder.proj.weight": torch.zeros(2)}, "model.pt", "does not say whether it is a DiT or a SiT"),
        ({}, "dit.bin", "a file of unknown kind"),
    ],
)
def test_other_files_are_refused(tmp_path, content, name, message):
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_denoiser(tmp_path / name)


def test_an_unknown_family_is_refused(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="unknown family 'unet' of a weight file"):
        load_denoiser(tmp_path / "dit.pt", family="unet")
