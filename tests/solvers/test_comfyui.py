"""The ComfyUI nodes inside ComfyUI's sampling: a stand-in, and ComfyUI itself where COMFYUI_CHECKOUT names it."""

import importlib
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from solvers import (
    Bands,
    DenoiserIdentity,
    NoiseSchedule,
    SolverTable,
    export_solver,
    named_solver,
    sample,
    save_solver,
    start_noise,
)
from tests.solvers import comfy_stand_in
from tests.solvers.test_export import load_module

CHECKOUT = os.environ.get("COMFYUI_CHECKOUT")
SCHEDULES = {
    "eps": NoiseSchedule.scaled_linear(),
    "v": NoiseSchedule.scaled_linear(prediction_type="v_prediction"),
    "flow": NoiseSchedule.flow(shift=3.0),
    "edm": NoiseSchedule.edm(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    "x0": NoiseSchedule.scaled_linear(prediction_type="sample"),
}
SHAPE, SCALE = (4, 6, 5), 3.0
SEEDS = [7, 8]
POSITIVE, NEGATIVE = ([[torch.full((1, 1, 4), value), {}]] for value in (0.4, -0.3))


class Network(nn.Module):
    """Depends on state, timestep and condition; scale at the end as of a trained one."""

    dtype = torch.float32

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **_: Any) -> Tensor:
        told = torch.sin(timestep / 150).reshape(-1, 1, 1, 1) + context.mean((1, 2)).reshape(-1, 1, 1, 1)
        return torch.tanh(x.roll(1, 1) + 0.5 * x + told)

    def null_condition(self, condition: Tensor) -> Tensor:
        return NEGATIVE[0][0].expand_as(condition)


class StandIn:
    """comfy.samplers of this project's tests."""

    samplers: Any = comfy_stand_in

    def model(self, kind: str, network: nn.Module) -> tuple[Any, Any]:
        """(what guiders take, what counts calls)."""
        model = comfy_stand_in.Model(network, comfy_stand_in.Sampling(SCHEDULES[kind]))
        return model, model


class ComfyUI:
    """ComfyUI's own classes around a network of ours."""

    def __init__(self, folder: str) -> None:
        sys.path.insert(0, folder)
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # of samplers that are not used here
        importlib.import_module("comfy.cli_args").args.cpu = True
        self.samplers = importlib.import_module("comfy.samplers")
        self.base, self.patcher = (importlib.import_module(f"comfy.{name}") for name in ("model_base", "model_patcher"))
        self.formats = importlib.import_module("comfy.latent_formats")

    def model(self, kind: str, network: nn.Module) -> tuple[Any, Any]:
        types_of = {"eps": "EPS", "v": "V_PREDICTION", "flow": "FLOW", "edm": "EDM"}
        config = SimpleNamespace(
            unet_config={"disable_unet_model_creation": True},
            latent_format=self.formats.LatentFormat(),
            manual_cast_dtype=None,
            sampling_settings=SCHEDULES[kind].parameters if kind == "edm" else {},
            memory_usage_factor=1.0,
        )
        model = self.base.BaseModel(config, self.base.ModelType[types_of[kind]], device=torch.device("cpu"))
        model.diffusion_model, model.seen = network, []
        apply = model.apply_model
        model.apply_model = lambda x, *rest, **more: (model.seen.append(len(x)), apply(x, *rest, **more))[1]
        cpu = torch.device("cpu")
        return self.patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu), model


@pytest.fixture(scope="module", params=["stand-in", "checkout"])
def comfy(request):
    if request.param == "checkout" and CHECKOUT is None:
        pytest.skip("COMFYUI_CHECKOUT names no checkout of ComfyUI")
    backend = StandIn() if request.param == "stand-in" else ComfyUI(CHECKOUT)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            patch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
            patch.setitem(sys.modules, "comfy.samplers", comfy_stand_in)
        yield backend


def nodes(tmp_path: Path, table: SolverTable, kind: str) -> Any:
    """The exported folder as ComfyUI imports it."""
    path = save_solver(table, tmp_path / "solver.json", DenoiserIdentity(SCHEDULES[kind], SCALE), method="olss")
    return load_module(export_solver(path, "comfyui", tmp_path / "learned") / "__init__.py", "learned")


def run(comfy: Any, module: Any, kind: str, latent: Tensor | None = None, mask: Tensor | None = None, seed: int = 7):
    """(image, sizes of network calls, rows seen by the callback) of a workflow with the node."""
    name, (wanted, counted) = next(iter(module.SOLVERS)), comfy.model(kind, Network())
    if "LearnedGuidedSolver" in module.NODE_CLASS_MAPPINGS:
        node = module.NODE_CLASS_MAPPINGS["LearnedGuidedSolver"]()
        guider, sampler, sigmas = node.build(name, wanted, POSITIVE, NEGATIVE)
    else:
        sampler, sigmas = module.NODE_CLASS_MAPPINGS["LearnedSolver"]().build(name)
        guider = comfy.samplers.CFGGuider(wanted)
        guider.set_conds(POSITIVE, NEGATIVE)
        guider.set_cfg(SCALE)
    noise, rows = start_noise(SEEDS, SHAPE), []
    latent = torch.zeros_like(noise) if latent is None else latent

    def seen(row, denoised, x, total):
        rows.append((row, total))

    image = guider.sample(
        noise, latent, sampler, sigmas, denoise_mask=mask, callback=seen, disable_pbar=True, seed=seed
    )
    return image, counted.seen, rows


def expected(table: SolverTable, seeds=SEEDS) -> Tensor:
    """What `sample` makes of the same network, guided as CFGGuider does where the table is not."""
    network, condition = Network(), POSITIVE[0][0].expand(len(SEEDS), -1, -1)
    if table.has_branches:
        return sample(network, table, start_noise(SEEDS, SHAPE), condition, seeds=seeds)

    def guided(x, timestep, condition):
        one, other = (network(x, timestep, told) for told in (condition, network.null_condition(condition)))
        return other + SCALE * (one - other)

    return sample(guided, table, start_noise(SEEDS, SHAPE), condition, seeds=seeds)


def in_bands(table: SolverTable, edges: tuple[float, ...]) -> SolverTable:
    space, generator = Bands(edges, 4), torch.Generator().manual_seed(0)
    weights = {name: space.embed(getattr(table, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    noise = torch.rand(space.ops, dtype=torch.float64, generator=generator)
    weights["output_coef"] = weights["output_coef"] * (1 + 0.2 * noise)
    return replace(table, space=space, **weights, state_support=None, output_support=None)


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 2e-5 * wanted.abs().max())


PARITY = [(kind, f"{name}:5") for kind in ("eps", "v", "flow") for name in ("euler", "unipc", "dpmpp", "heun")]
PARITY += [("edm", "euler:6"), ("edm", "dpmpp:5")]


@pytest.mark.parametrize(("kind", "solver"), PARITY)
def test_parity(tmp_path, comfy, kind, solver):
    table = named_solver(solver, SCHEDULES[kind])
    image, calls, rows = run(comfy, nodes(tmp_path, table, kind), kind)
    assert close(image, expected(table))
    assert calls == [2 * len(SEEDS)] * table.num_rows
    assert rows == [(row, table.num_rows) for row in range(table.num_rows)]


@pytest.mark.parametrize("at_maximum", [True, False])  # ComfyUI scales the noise otherwise there
@pytest.mark.parametrize("kind", ["eps", "v", "flow", "x0"])
def test_learned_tables(tmp_path, comfy, kind, at_maximum):
    """Random rows, timesteps off their nodes, another start scale, fresh noises."""
    if kind == "x0" and isinstance(comfy, ComfyUI):
        pytest.skip("ComfyUI knows no latent model that predicts the data")
    schedule, generator, steps = SCHEDULES[kind], torch.Generator().manual_seed(0), 4
    timesteps = torch.tensor([schedule.t_max if at_maximum else 900, 640, 333, 41], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(timesteps)
    lower = [0.5 * torch.randn(steps, steps, generator=generator, dtype=torch.float64).tril() for _ in range(3)]
    alpha, sigma = torch.cat([alpha, torch.ones(1)]), torch.cat([sigma, torch.zeros(1)])
    told = timesteps - torch.tensor([3.0, 7, 2, 5], dtype=torch.float64)
    table = SolverTable(told, alpha, sigma, *lower, 0.9, schedule.prediction_type)
    assert close(run(comfy, nodes(tmp_path, table, kind), kind)[0], expected(table))


@pytest.mark.parametrize("edges", [(), (0.1, 0.3)])
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_calls_and_operators(tmp_path, comfy, kind, edges):
    """Guidance inside the table, left out at one row: the calls are made and no more, those of a row at once."""
    table = in_bands(named_solver("dpmpp:4", SCHEDULES[kind]), edges).guided(SCALE, rows=[0, 1, 3])
    module = nodes(tmp_path, table, kind)
    assert list(module.NODE_CLASS_MAPPINGS) == ["LearnedGuidedSolver"]
    image, calls, _ = run(comfy, module, kind)
    assert close(image, expected(table))
    assert calls == [4, 4, 2, 4]


def test_a_row_without_a_call(tmp_path, comfy):
    """Outputs are guided by the workflow's guider; one is used again instead of the next."""
    whole = named_solver("ddim:3", SCHEDULES["eps"])
    coef = torch.cat([whole.output_coef[:, :1] + whole.output_coef[:, 1:2], whole.output_coef[:, 2:]], 1)
    table = replace(whole, calls=(whole.calls[0], whole.calls[2]), output_coef=coef, output_support=None)
    image, calls, rows = run(comfy, nodes(tmp_path, table, "eps"), "eps")
    assert close(image, expected(table))
    assert (len(calls), len(rows)) == (2, 3)


def test_fresh_noises_come_from_the_seed(tmp_path, comfy):
    table = named_solver("ddim:4", SCHEDULES["eps"])
    table = replace(table, noise_coef=torch.diag(torch.tensor([0.3, 0.2, 0.1, 0.0], dtype=torch.float64)))
    module = nodes(tmp_path, table, "eps")
    assert close(run(comfy, module, "eps")[0], expected(table))
    assert close(run(comfy, module, "eps", seed=9)[0], expected(table, seeds=[9, 10]))


@pytest.mark.parametrize(("made_for", "kind"), [("eps", "flow"), ("flow", "eps"), ("flow", "v")])
def test_a_model_of_another_kind_is_refused(tmp_path, comfy, made_for, kind):
    module = nodes(tmp_path, named_solver("ddim:3" if made_for == "eps" else "euler:3", SCHEDULES[made_for]), made_for)
    with pytest.raises(ValueError, match=r"^this solver was made for a .*, the model is a .*: use one made for this"):
        run(comfy, module, kind)


@pytest.mark.parametrize("other", [NoiseSchedule.linear(), SCHEDULES["edm"]])
def test_a_model_of_another_noise_schedule_is_refused(tmp_path, comfy, other):
    solver = "euler:3" if other.kind == "edm" else "ddim:3"
    path = save_solver(named_solver(solver, other), tmp_path / "s.json", DenoiserIdentity(other), method="olss")
    module = load_module(export_solver(path, "comfyui", tmp_path / "learned") / "__init__.py", "learned")
    with pytest.raises(
        ValueError, match=r"^the model has another noise schedule, its timesteps would be \[\d+, .*\] instead of"
    ):
        run(comfy, module, "eps")


def test_the_kept_area_of_a_mask_ends_clean(tmp_path, comfy):
    """A learned table's last row is no step to the data of the last output alone, as euler's is."""
    table = named_solver("unipc:4", SCHEDULES["eps"])
    learned = replace(table, output_coef=table.output_coef * 1.01)
    latent, mask = torch.randn(2, *SHAPE), torch.zeros(2, 1, *SHAPE[1:])
    mask[..., :3] = 1
    for solver in (table, learned):
        image, _, _ = run(comfy, nodes(tmp_path, solver, "eps"), "eps", latent, mask)
        assert (image[..., 3:] - latent[..., 3:]).abs().max() < 1e-6
        assert (image[..., :3] - latent[..., :3]).abs().max() > 0.1


def test_what_does_not_go_together_is_one_line(tmp_path, comfy):
    module = nodes(tmp_path, named_solver("ddim:3", SCHEDULES["eps"]).guided(SCALE), "eps")
    (name, _), (wanted, _) = next(iter(module.SOLVERS.items())), comfy.model("eps", Network())
    guider, sampler, sigmas = module.LearnedGuidedSolver().build(name, wanted, POSITIVE, NEGATIVE)
    plain = comfy.samplers.CFGGuider(wanted)
    plain.set_conds(POSITIVE, NEGATIVE)
    noise = start_noise(SEEDS, SHAPE)
    with pytest.raises(ValueError, match=r"^this solver makes its own unconditional calls: connect the GUIDER"):
        plain.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0)
    with pytest.raises(ValueError, match=r"^2 sigmas for a solver of 3 steps: connect the SIGMAS of the same node"):
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas[1:], seed=0)
    guider.model_options["sampler_cfg_function"] = print
    with pytest.raises(ValueError, match=r"take the patch of it away \(sampler_cfg_function\)"):
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0)


def test_a_folder_holds_several_solvers_and_needs_nothing_else(tmp_path, comfy):
    paths = []
    for table in (named_solver("ddim:3", SCHEDULES["eps"]), named_solver("unipc:5", SCHEDULES["eps"]).guided(SCALE)):
        path = tmp_path / f"{table.num_rows}.json"
        paths.append(save_solver(table, path, DenoiserIdentity(SCHEDULES["eps"], SCALE), method="olss"))
    folder = export_solver(paths, "comfyui", tmp_path / "learned")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "__init__.py", "solvers.json"]
    source = (folder / "__init__.py").read_text()
    assert "solvers." not in source.replace("solvers.json", "")
    module = load_module(folder / "__init__.py", "several")
    assert list(module.NODE_CLASS_MAPPINGS) == ["LearnedSolver", "LearnedGuidedSolver"]
    assert module.LearnedSolver.INPUT_TYPES() == {"required": {"solver": (["olss-3"],)}}
    assert module.LearnedGuidedSolver.INPUT_TYPES()["required"]["solver"] == (["olss-5"],)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert len(module.LearnedSolver().build("olss-3")[1]) == 4
