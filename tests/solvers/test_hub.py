"""Artifact folders go to the Hub with a model card; the upload itself is replaced."""

from types import SimpleNamespace

import pytest
import torch

from solvers import DenoiserIdentity, NoiseSchedule, SolverError, SolverTable, push_to_hub, save_solver


def save(folder, name="olss-2.json", **options):
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    nodes = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    table = SolverTable(torch.tensor([900.0, 400.0]).double(), nodes, nodes.flip(0), eye, eye, zero, 1.0, "epsilon")
    settings = {"method": "olss", "denoiser": DenoiserIdentity(NoiseSchedule.linear(), 2.0, name="cifar10-dit")}
    return save_solver(table, folder / name, **settings | options)


@pytest.fixture
def uploads(monkeypatch):
    calls = []

    def upload(self, **options):
        calls.append(options)
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    return calls


def test_figures_pictures_and_the_licence_of_the_base_are_in_the_card(tmp_path, uploads, monkeypatch):
    def info(self, name):
        return SimpleNamespace(card_data=SimpleNamespace(license={"me/base": "openrail++"}[name]))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.md").write_text("# Comparison\n\n| solver | RMSE |\n|---|---:|\n| unipc:2 | 0.5 |\n")
    save(tmp_path)
    with pytest.raises(SolverError, match=r"report is no report of `sample.py compare` \(no comparison.png\)"):
        push_to_hub(tmp_path, "me/solvers", report=report)
    assert uploads == []
    (report / "comparison.png").write_bytes(b"picture")
    push_to_hub(tmp_path, "me/solvers", report=report, base_model="me/base")
    assert uploads[0]["allow_patterns"] == ["README.md", "comparison.png", "olss-2.json"]
    assert (tmp_path / "comparison.png").read_bytes() == b"picture"
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nbase_model: me/base\nlicense: openrail++\ntags:\n")
    assert "| unipc:2 | 0.5 |" in card
    assert "](comparison.png)" in card
    assert "# Comparison" not in card
    push_to_hub(tmp_path, "me/solvers", license="mit")
    assert "license: mit" in (tmp_path / "README.md").read_text()


def test_a_hub_that_is_not_there_is_one_line(tmp_path, uploads, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SolverError, match=r"^nothing was uploaded, there is no token: log in with `hf auth login`"):
        push_to_hub(tmp_path, "me/solvers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SolverError, match=r"^nothing was uploaded, offline mode is on: unset HF_HUB_OFFLINE$"):
        push_to_hub(tmp_path, "me/solvers", token="secret")
    assert not (tmp_path / "README.md").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for error in (ConnectionError("no\nroute"), httpx_error("no\nroute")):

        def refuse(self, repo_id, error=error, **_):
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
        with pytest.raises(SolverError, match=r"^the Hub does not take it \(no route\): check connection"):
            push_to_hub(tmp_path, "me/solvers", token="secret")


def httpx_error(text):
    from huggingface_hub.errors import HTTPError

    return HTTPError(text)


def test_artifacts_student_and_card_are_uploaded_and_nothing_else(tmp_path, uploads):
    (tmp_path / "student").mkdir()
    for name in ("student/model.safetensors", "student/config.json", "secret.txt", "config.json"):
        (tmp_path / name).write_text("{}")
    save(tmp_path, validation={"rmse": 0.03125, "seeds": [[0, 256]]}, fitted_on={"teacher": "ddim:100"})
    save(tmp_path, "slam-2.json", method="slam", student="student/model.safetensors")
    assert push_to_hub(tmp_path, "me/solvers", private=True) == "https://hub/commit"
    (call,) = uploads
    assert call["repo_id"] == "me/solvers"
    expected = ["README.md", "olss-2.json", "slam-2.json", "student/config.json", "student/model.safetensors"]
    assert call["allow_patterns"] == expected
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "| `olss-2.json` | olss | 2 | cifar10-dit | 2.0 | rmse 0.03125 |" in card
    assert "teacher ddim:100" in card
    assert 'hf_hub_download("me/solvers", "olss-2.json")' in card


def test_a_student_that_is_a_pipeline_is_uploaded_whole(tmp_path, uploads):
    parts = ["denoiser.yaml", "model_index.json", "scheduler/scheduler_config.json", "unet/w.safetensors", "vae/a.bin"]
    for name in parts:
        (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / name).write_text("{}")
    save(tmp_path, "slam-2.json", method="slam", student="student/unet/w.safetensors")
    push_to_hub(tmp_path, "me/solvers")
    assert uploads[0]["allow_patterns"] == ["README.md", "slam-2.json", *(f"student/{name}" for name in parts)]


def test_nothing_is_uploaded_from_a_folder_with_a_fault(tmp_path, uploads):
    with pytest.raises(SolverError, match="holds no solver artifact"):
        push_to_hub(tmp_path, "me/solvers")
    path = save(tmp_path)
    path.write_text(path.read_text().replace('"olss"', "3"))
    with pytest.raises(SolverError, match="method is int"):
        push_to_hub(tmp_path, "me/solvers")
    assert uploads == []
