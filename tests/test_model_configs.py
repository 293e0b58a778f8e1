"""The configs of real models, which differ from tiny ones in the path alone."""

import inspect
from pathlib import Path

import pytest
import yaml

from solvers import load_solver
from tests.tiny_pipelines import LENGTH, tiny_pipeline

MODELS = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "dit-xl2": "dit"}
DESCRIPTIONS = sorted(Path("configs/models").glob("*/denoiser.yaml"))


@pytest.mark.parametrize("file", DESCRIPTIONS, ids=lambda file: file.parent.name)
def test_descriptions_name_known_options(file: Path) -> None:
    from denoisers.diffusers_load import DTYPES, load_diffusers, load_pipeline

    text = file.read_text()
    described = yaml.safe_load(text)
    loader = load_pipeline if described.pop("family", None) == "pipeline" else load_diffusers
    assert described.keys() - {"path", "device"} <= inspect.signature(loader).parameters.keys()
    assert described["dtype"] in DTYPES
    assert "prompts" not in described or (file.parent / described["prompts"]).is_file()
    assert "ownload once" in text.splitlines()[0] or loader is load_pipeline


@pytest.mark.parametrize("model", MODELS)
def test_headers_say_what_to_expect(model: str) -> None:
    for method in ("trajectories", "olss"):
        header = Path(f"configs/{method}/{model}.yaml").read_text().split("\ntrainer:")[0]
        assert "GPU memory" in header
        assert "minutes" in header
    guidance = [
        yaml.safe_load(Path(f"configs/{method}/{model}.yaml").read_text())["model"]["init_args"]["guidance_scale"]
        for method in ("trajectories", "olss")
    ]
    assert guidance[0] == guidance[1]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_way_from_teacher_to_solver(model: str, tmp_path: Path) -> None:
    """Both configs on a tiny model in place of the real one."""
    from train import main

    folder, trajectories, output = (str(tmp_path / name) for name in ("model", "trajectories", "solvers"))
    tiny_pipeline(MODELS[model]).save_pretrained(folder)
    longer = {} if model in ("sd15", "sdxl") else {"encode": {"max_sequence_length": LENGTH}}
    described = {} if model == "dit-xl2" else {"prompts": ["a cat", "dog"], **longer}
    if model == "flux":
        described |= {"height": 16, "width": 16}
    Path(folder, "denoiser.yaml").write_text(yaml.safe_dump(described))
    shared = [f"--model.denoiser={folder}", "--trainer.accelerator=cpu"]
    teacher = "euler:6" if model in ("sd3", "flux") else "ddim:6"
    shorter = ["--model.num_trajectories=4", f"--model.teacher={teacher}"]
    main(
        ["predict", f"--config=configs/trajectories/{model}.yaml", *shared, *shorter, f"--model.folder={trajectories}"]
    )
    places = [f"--data.trajectories={trajectories}", f"--model.output={output}"]
    main(
        ["fit", f"--config=configs/olss/{model}.yaml", *shared, *places, "--model.method.calls=[4]", "--data.holdout=2"]
    )
    assert load_solver(f"{output}/olss-4.json").info["method"] == "olss"
    if Path(f"configs/solver_search/{model}.yaml").exists():
        places = [f"--data.trajectories={trajectories}", f"--model.output={output}"]
        small = ["--model.method.nfe=[3]", "--model.method.descent.steps=1", "--data.holdout=2", "--data.batch_size=2"]
        main(["fit", f"--config=configs/solver_search/{model}.yaml", *shared, *places, *small])
        assert load_solver(f"{output}/solver-search-3.json").info["method"] == "solver_search"
