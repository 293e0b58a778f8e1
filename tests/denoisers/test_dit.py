"""The DiT: names of the public checkpoints, timesteps, null class, learned sigma, and its files."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from denoisers import load_denoiser
from denoisers.checkpoint import load_weights, save_denoiser
from denoisers.dit import DiT, position_embedding, sinusoids
from denoisers.dit_load import load_checkpoint
from solvers.identity import identify, weight_hash
from solvers.schedule import NoiseSchedule

SMALL = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 4}

# DiT-S/2 at 256 pixels as published (latents 4 x 32 x 32, learned sigma, 1000 classes), of its 12 blocks the first.
PUBLIC_SHAPES = {
    "pos_embed": (1, 256, 384),
    "x_embedder.proj.weight": (384, 4, 2, 2),
    "x_embedder.proj.bias": (384,),
    "t_embedder.mlp.0.weight": (384, 256),
    "t_embedder.mlp.0.bias": (384,),
    "t_embedder.mlp.2.weight": (384, 384),
    "t_embedder.mlp.2.bias": (384,),
    "y_embedder.embedding_table.weight": (1001, 384),
    "blocks.0.attn.qkv.weight": (1152, 384),
    "blocks.0.attn.qkv.bias": (1152,),
    "blocks.0.attn.proj.weight": (384, 384),
    "blocks.0.attn.proj.bias": (384,),
    "blocks.0.mlp.fc1.weight": (1536, 384),
    "blocks.0.mlp.fc1.bias": (1536,),
    "blocks.0.mlp.fc2.weight": (384, 1536),
    "blocks.0.mlp.fc2.bias": (384,),
    "blocks.0.adaLN_modulation.1.weight": (2304, 384),
    "blocks.0.adaLN_modulation.1.bias": (2304,),
    "final_layer.linear.weight": (32, 384),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (768, 384),
    "final_layer.adaLN_modulation.1.bias": (768,),
}


def randomized(model: nn.Module) -> nn.Module:
    """adaLN-zero starts as the zero function: give every weight a value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def small(schedule: NoiseSchedule | None = None, **options) -> DiT:
    torch.manual_seed(0)
    return randomized(DiT(schedule or NoiseSchedule.linear(), **SMALL | options))


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, 999 * torch.rand(batch, generator=generator), torch.arange(batch)


def test_names_and_shapes_are_those_of_the_public_checkpoints():
    network = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 384, "depth": 1, "num_heads": 6}
    model = DiT(NoiseSchedule.linear(), **network, num_classes=1000, learn_sigma=True)
    assert model.weight_shapes == PUBLIC_SHAPES


def test_starts_as_the_zero_function():
    model = DiT(NoiseSchedule.linear(), **SMALL)
    assert model(*inputs()).abs().max() == 0


def test_sinusoids_are_cosines_then_sines_of_geometric_frequencies():
    row = sinusoids(torch.tensor([2.5]), 128)[0].double()
    for i in (0, 1, 64, 127):
        angle = 2.5 * 10000 ** (-i / 128)
        assert row[i] == pytest.approx(math.cos(angle), abs=1e-6)
        assert row[128 + i] == pytest.approx(math.sin(angle), abs=1e-6)


def test_timesteps_stay_float32_under_autocast():
    model, (x, _, labels) = small(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (model(x, torch.tensor(t), labels) for t in (998.0, 999.0))
    assert (one - other).abs().max() > 0
    assert torch.equal(
        sinusoids(torch.tensor([998.5], dtype=torch.bfloat16).float(), 4), sinusoids(torch.tensor([1000.0]), 4)
    )


def test_position_embedding_has_columns_before_rows():
    embedding = position_embedding(8, 3)[0].reshape(3, 3, 8).double()
    frequency = torch.tensor([1.0, 0.01], dtype=torch.float64)
    for row, column in ((0, 2), (2, 1)):
        expected = torch.cat([f(place * frequency) for place in (column, row) for f in (torch.sin, torch.cos)])
        torch.testing.assert_close(embedding[row, column], expected, atol=1e-7, rtol=0)


def test_fractional_timesteps_move_the_output_smoothly():
    model, (x, _, labels) = small(), inputs()
    low, middle, high = (model(x, torch.tensor(t), labels) for t in (10.0, 10.5, 11.0))
    assert 0.2 < (middle - low).norm() / (high - low).norm() < 0.8


def test_scalar_and_batched_timesteps_agree():
    model, (x, _, labels) = small(), inputs()
    torch.testing.assert_close(model(x, torch.tensor(7.25), labels), model(x, torch.full((3,), 7.25), labels))


def test_no_condition_is_the_null_class():
    model, (x, timestep, labels) = small(), inputs()
    null = model.null_condition(labels)
    assert null.tolist() == [10, 10, 10]
    assert torch.equal(model(x, timestep), model(x, timestep, null))
    assert not torch.allclose(model(x, timestep), model(x, timestep, labels))


def test_patches_return_to_their_place():
    """With attention, MLP and context off, the last layer sees one patch alone."""
    model, (x, timestep, labels) = small(), inputs(1)
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    changed = x.clone()
    changed[0, 1, 5, 2] += 1
    difference = (model(changed, timestep, labels) - model(x, timestep, labels)).abs().amax((0, 1)) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4:6, 2:4] = True
    assert torch.equal(difference, expected)


def test_output_pixels_follow_the_public_order():
    """The last layer's outputs are (row in patch, column in patch, channel)."""
    model, (x, timestep, labels) = small(), inputs(1)
    nn.init.zeros_(model.final_layer.linear.weight)
    model.final_layer.linear.bias.copy_(torch.arange(12))
    output = model(x, timestep, labels)[0]
    assert output[:, 2, 4].tolist() == [0, 1, 2]
    assert output[:, 2, 5].tolist() == [3, 4, 5]
    assert output[:, 3, 4].tolist() == [6, 7, 8]


def test_learned_sigma_channels_are_left_out():
    both, plain = small(learn_sigma=True), small()
    weights = both.state_dict()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        value = weights[name]
        weights[name] = value.reshape(4, 6, *value.shape[1:])[:, :3].reshape(12, *value.shape[1:])
    plain.load_state_dict(weights)
    torch.testing.assert_close(both(*inputs()), plain(*inputs()))


def test_sit_convention_turns_time_and_sign():
    flow = NoiseSchedule.flow()
    ours, sit = small(flow), small(flow, convention="sit")
    x, timestep, labels = inputs()
    torch.testing.assert_close(sit(x, timestep, labels), -ours(x, 1 - timestep / 1000, labels))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        model = small(gradient_checkpointing=flag).requires_grad_(True)
        model(*inputs()).square().sum().backward()
        gradients.append(model.blocks[0].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_checkpoint_folder_round_trip(tmp_path):
    model = small()
    digest = save_denoiser(model, tmp_path / "tiny", {"steps": 3})
    loaded = load_checkpoint(tmp_path / "tiny")
    assert weight_hash(loaded) == digest == json.loads((tmp_path / "tiny/config.json").read_text())["weight_hash"]
    assert loaded.schedule == model.schedule
    assert loaded.sample_shape == (3, 8, 8)
    assert loaded.name == "tiny"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())
    assert not loaded.training
    assert not any(value.requires_grad for value in loaded.parameters())
    assert load_file(tmp_path / "tiny/model.safetensors")["pos_embed"].dtype == torch.bfloat16


def test_weight_hash_sees_every_weight():
    model = small()
    before = weight_hash(model)
    model.final_layer.linear.bias[0] += 1e-6
    assert weight_hash(model) != before


def test_a_loaded_network_that_is_changed_is_another(tmp_path):
    digest = save_denoiser(small(), tmp_path)
    loaded = load_denoiser(tmp_path)
    assert identify(loaded).weight_hash == digest
    loaded.final_layer.linear.bias.data += 1
    assert identify(loaded).weight_hash != digest


def damage(folder, name: str) -> None:
    path = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if name == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif name == "no weights":
        path.unlink()
    elif name == "version":
        (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    elif name == "incomplete":
        del config["schedule"]
        (folder / "config.json").write_text(json.dumps(config))
    elif name == "not json":
        (folder / "config.json").write_text("{")


def test_weights_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"pos_embed: found \(1, 16, 32\), need \(1, 4, 32\)"):
        load_weights(small(input_size=4), small().state_dict(), "here")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated", "differs from the hash"),
        ("no weights", r"has no model\.safetensors"),
        ("version", "format_version 99"),
        ("incomplete", "lacks schedule"),
        ("not json", "not valid JSON"),
    ],
)
def test_damaged_folders_are_named(tmp_path, name, message):
    save_denoiser(small(), tmp_path)
    damage(tmp_path, name)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "not a multiple of patch_size 3"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"convention": "x"}, "unknown convention 'x'"),
        ({"convention": "sit"}, "needs a flow schedule"),
    ],
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(NoiseSchedule.linear(), **SMALL | options)
