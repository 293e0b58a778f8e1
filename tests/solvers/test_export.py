"""Every export runs by itself and computes what `sample` computes."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline

from denoisers import with_guidance
from denoisers.diffusers_models import from_pipeline
from denoisers.prompts import encode_prompts
from solvers import (
    Bands,
    DenoiserIdentity,
    NoiseSchedule,
    SolverError,
    SolverTable,
    TableScheduler,
    export_solver,
    load_solver,
    row_noise,
    sample,
    save_solver,
    start_noise,
    tabulate,
)
from tests.analytic import two_point_denoiser
from tests.tiny_pipelines import call_arguments, tiny_pipeline, tiny_unet

KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def schedule_of(kind: str) -> NoiseSchedule:
    return NoiseSchedule.flow(shift=2.0) if kind == "flow_prediction" else NoiseSchedule.linear(prediction_type=kind)


def learned_table(kind: str, steps: int = 4, stochastic: bool = False, start_scale: float = 1.0) -> SolverTable:
    """Random rows on rising nodes, timesteps off their nodes as a tuned solver has them."""
    generator = torch.Generator().manual_seed(steps)
    schedule = schedule_of(kind)
    timesteps = torch.linspace(schedule.t_max, 20.0, steps, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(timesteps)

    def lower(scale):
        return scale * torch.randn(steps, steps, generator=generator, dtype=torch.float64).tril()

    return SolverTable(
        timesteps - 7.3 * torch.rand(steps, generator=generator, dtype=torch.float64),
        torch.cat([alpha, torch.ones(1).double()]),
        torch.cat([sigma, torch.zeros(1).double()]),
        lower(0.5),
        lower(0.5),
        lower(0.5) if stochastic else torch.zeros(steps, steps, dtype=torch.float64),
        start_scale,
        kind,
    )


def artifact(tmp_path, table: SolverTable, schedule: NoiseSchedule | None = None, name: str = "solver.json") -> Path:
    schedule = schedule or schedule_of(table.prediction_type)
    return save_solver(table, tmp_path / name, DenoiserIdentity(schedule, 3.0), method="olss")


def load_module(path: Path, name: str):
    """A file as a module, as another program would load it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_numpy_file_equals_sample(tmp_path, kind, stochastic):
    table, denoiser = learned_table(kind, stochastic=stochastic, start_scale=0.9), two_point_denoiser(schedule_of(kind))
    path = export_solver(artifact(tmp_path, table), "numpy", tmp_path / "out")
    solver = load_module(path, "numpy_solver")
    noise = start_noise([1, 2], (3, 5), torch.float64)
    step_noise = torch.stack([row_noise([1, 2], row, (3, 5), torch.float64) for row in range(table.nfe)])
    calls = []

    def model(x, timestep):
        calls.append(timestep)
        return denoiser(torch.from_numpy(x), torch.tensor(timestep, dtype=torch.float64)).numpy()

    found = solver.sample(model, noise.numpy(), step_noise.numpy() if stochastic else None)
    expected = sample(denoiser, table, noise, seeds=[1, 2])
    assert np.abs(found - expected.numpy()).max() < 1e-12
    assert calls == table.timesteps.tolist()
    assert solver.sample(model, noise.float().numpy(), step_noise.float().numpy()).dtype == np.float32
    assert solver.TABLE["guidance_scale"] == 3.0


@pytest.mark.parametrize("edges", [None, (), (0.1, 0.3)])
def test_numpy_file_makes_calls_and_weighs_bands(tmp_path, edges):
    table = learned_table("epsilon").guided(2.5, rows=[0, 2])
    if edges is not None:
        space = Bands(edges, 3)
        names = ("state_coef", "output_coef", "noise_coef")
        weights = {name: space.embed(getattr(table, name)) for name in names}
        weights["output_coef"] = weights["output_coef"] * torch.rand(space.ops, dtype=torch.float64)
        table = replace(table, space=space, **weights, state_support=None, output_support=None)
    solver = load_module(export_solver(artifact(tmp_path, table), "numpy", tmp_path / "out"), "numpy_solver")
    noise, condition = start_noise([1, 2], (3, 5, 6), torch.float64), torch.tensor([0.3, -0.2], dtype=torch.float64)

    def network(x, timestep, condition):
        return torch.tanh(x + torch.sin(timestep / 100) + condition.reshape(-1, 1, 1, 1))

    def model(x, timestep, branch):
        told = condition if branch == "conditional" else torch.zeros_like(condition)
        return network(torch.from_numpy(x), torch.tensor(timestep, dtype=torch.float64), told).numpy()

    network.null_condition = torch.zeros_like
    wanted = sample(network, table, noise, condition)
    assert np.abs(solver.sample(model, noise.numpy()) - wanted.numpy()).max() < 1e-12


def test_a_scheduler_alone_runs_no_calls_of_the_solvers_own(tmp_path):
    table = learned_table("epsilon").guided(2.0)
    with pytest.raises(SolverError, match="cannot run this solver, which has network calls of its own"):
        export_solver(artifact(tmp_path, table), "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numpy_file_needs_nothing_but_numpy(tmp_path):
    path = export_solver(artifact(tmp_path, learned_table("epsilon", stochastic=True)), "numpy", tmp_path / "mine.py")
    assert path == tmp_path / "mine.py"
    imports = [line for line in path.read_text().splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import numpy as np"]
    with pytest.raises(ValueError, match=r"pass step_noise of shape \(4, 2, 3\)"):
        load_module(path, "mine").sample(lambda x, t: x, np.zeros((2, 3)))


def test_what_comfyui_cannot_run_is_refused(tmp_path):
    with pytest.raises(SolverError, match="carries no noise schedule"):
        export_solver(learned_table("epsilon"), "comfyui", tmp_path)
    zero = NoiseSchedule.linear(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    table = learned_table("v_prediction")
    table = SolverTable(
        **{name: getattr(table, name) for name in table.__dataclass_fields__ if name not in ("timesteps", "info")},
        timesteps=torch.tensor([999.0, 600, 300, 10], dtype=torch.float64),
    )
    with pytest.raises(SolverError, match="alpha = 0"):
        export_solver(artifact(tmp_path, table, zero), "comfyui", tmp_path)


def test_diffusers_folder_runs_in_a_saved_pipeline(tmp_path):
    pipe = tiny_pipeline("sd")
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    config = dict(pipe.scheduler.config) | {"timestep_spacing": "trailing"}
    table = tabulate(type(pipe.scheduler).from_config(config), 3)
    pipe.save_pretrained(tmp_path / "pipe")
    path = artifact(tmp_path, table, schedule)
    folder = export_solver(path, "diffusers", tmp_path / "export", pipeline=tmp_path / "pipe")
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "scheduler_config.json",
        "table_scheduler.py",
    ]
    source = (folder / "table_scheduler.py").read_text()
    assert "import solvers" not in source
    assert "from solvers" not in source
    module = load_module(folder / "table_scheduler.py", "table_scheduler_alone")
    alone = module.TableScheduler.from_pretrained(folder)
    arguments = call_arguments("sd", ["a cat"], 3.0, 3)
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    expected = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    pipe.scheduler = alone
    for candidate in (loaded, pipe):
        found = candidate(**arguments, generator=torch.Generator().manual_seed(0)).images
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert type(loaded.scheduler).__module__.split(".")[0] != "solvers"
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)


def test_diffusers_folder_weighs_bands(tmp_path):
    pipe = tiny_pipeline("sd")
    space = Bands((0.1, 0.3), 4)
    table = learned_table("epsilon", steps=3)
    weights = {name: space.embed(getattr(table, name)) for name in ("state_coef", "output_coef", "noise_coef")}
    weights["output_coef"] = weights["output_coef"] * torch.rand(space.ops, dtype=torch.float64)
    table = replace(table, space=space, **weights, state_support=None, output_support=None)
    path = artifact(tmp_path, table, NoiseSchedule.from_scheduler(pipe.scheduler))
    pipe.save_pretrained(tmp_path / "pipe")
    export_solver(path, "diffusers", tmp_path / "export", pipeline=tmp_path / "pipe")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    denoiser, noise = from_pipeline(pipe, 16, 16), start_noise([1, 2], (4, 8, 8))
    found = loaded(**call_arguments("sd", ["a cat", "dog"], 3.0, 3), latents=noise).images
    expected = sample(with_guidance(denoiser, 3.0), table, noise, encode_prompts(pipe, ["a cat", "dog"]))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match=r"called at guidance scale 1\.0, this solver was made for 3\.0"):
        loaded(**call_arguments("sd", ["a cat", "dog"], 1.0, 3), latents=noise)


def test_a_saved_pipeline_that_does_not_fit_stays_as_it_is(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path / "pipe")
    path = artifact(tmp_path, learned_table("epsilon"))
    before = (tmp_path / "pipe" / "model_index.json").read_text()
    with pytest.raises(SolverError, match="made for noise schedule"):
        export_solver(path, "diffusers", tmp_path / "export", pipeline=tmp_path / "pipe")
    assert (tmp_path / "pipe" / "model_index.json").read_text() == before
    export_solver(path, "diffusers", tmp_path / "export", pipeline=tmp_path / "pipe", allow_mismatch="noise schedule")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["table_scheduler", "TableScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    with pytest.raises(SolverError, match="is not the folder of a saved diffusers pipeline"):
        export_solver(path, "diffusers", tmp_path / "export", pipeline=tmp_path / "none")


def test_a_saved_pipeline_that_loads_its_own_scheduler_is_refused(tmp_path):
    """A DDIMPipeline makes a DDIMScheduler of any scheduler, and would run plain DDIM without a word."""
    pipe = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path / "pipe")
    before = (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").read_text()
    path = artifact(tmp_path, learned_table("epsilon"), NoiseSchedule.from_scheduler(pipe.scheduler))
    reason = "a saved DDIMPipeline makes a scheduler of diffusers .* save the scheduler alone"
    with pytest.raises(ValueError, match=reason):
        export_solver(path, "diffusers", tmp_path / "export", pipeline=tmp_path / "pipe")
    assert (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").read_text() == before
    pipe.scheduler = TableScheduler.for_pipeline(path, pipe)
    with pytest.raises(ValueError, match=reason):
        pipe.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "model_index.json").exists()
    pipe.scheduler.save_pretrained(tmp_path / "alone")
    assert TableScheduler.from_pretrained(tmp_path / "alone").config["tables"] == pipe.scheduler.config["tables"]


def test_exports_keep_every_double(tmp_path):
    table = load_solver(artifact(tmp_path, learned_table("epsilon")))
    folder = export_solver(table, "diffusers", tmp_path / "d")
    config = json.loads((folder / "scheduler_config.json").read_text())["tables"][0]
    assert config["output_coef"] == table.output_coef.tolist()
    module = load_module(export_solver(table, "numpy", tmp_path / "n"), "n")
    assert module.TABLE["state_coef"] == table.state_coef.tolist()


@pytest.mark.parametrize(
    ("to", "solvers", "options", "message"),
    [
        ("onnx", 1, {}, "cannot export to 'onnx': use one of diffusers, comfyui, numpy"),
        ("numpy", 2, {}, "a NumPy file holds one solver, 2 were given"),
        ("numpy", 1, {"pipeline": "p"}, "belongs to no pipeline"),
        ("comfyui", 0, {}, "export at least one"),
    ],
)
def test_refusals(tmp_path, to, solvers, options, message):
    tables = [learned_table("epsilon", steps) for steps in (3, 4)][:solvers]
    with pytest.raises(SolverError, match=message):
        export_solver(tables, to, tmp_path / "out", **options)
    with pytest.raises(SolverError, match="there is no such file"):
        export_solver(tmp_path / "none.json", "numpy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
