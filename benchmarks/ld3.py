"""LD3 (arXiv 2405.15506) by its released code on a model of ours: time steps of UniPC or iPNDM, as artifacts.

    git clone https://github.com/vinhsuhi/LD3
    python train.py predict --config configs/trajectories/fashion-sit.yaml
    python benchmarks/ld3.py --code LD3 --denoiser checkpoints/fashion-sit \\
        --trajectories runs/trajectories/fashion-sit --output checkpoints/solvers/fashion-sit/peers

The code in --code is imported and run: its solver, its parameters, its trainer with the settings of its
configs/cifar10.yml (50 pairs of noise and image to train, 50 to validate, 7 rounds), but for the loss, which is its own
`L2`, as LPIPS needs weights to download. It sees the model as EDM's x = data + s noise, s from 80 to 0.002. Its sampler
is linear in the noise and in what the network says, so that one run on their names gives the solver table,
ld3-SOLVER-N.json, which `benchmarks/results.py` compares with ours.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import Trajectories, seed_ranges
from data.trajectories import TrajectoryCache
from denoisers import Evaluations, index_condition, load_denoiser
from solvers import NoiseSchedule, SolverTable, identify, save_solver
from solvers.prediction import data_weights
from training.arguments import guarded

SOLVERS = {"unipc": ("uni_pc", 3), "ipndm": ("ipndm", 4)}
LARGEST, SMALLEST = 80.0, 0.002


class Edm:
    """A model as EDM's networks are called: (x, s, condition) -> data, with x = data + s noise; differentiable in s.

    Args:
        schedule: of the model.
        network: (state, timestep, condition) -> output.
    """

    def __init__(self, schedule: NoiseSchedule, network: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        self.schedule, self.network = schedule, network

    def node(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of a noise level; a level beyond the schedule's gets its end."""
        return self.schedule.alpha_sigma(self.schedule.timestep(torch.ones_like(level), level))

    def __call__(self, x: Tensor, level: Tensor, condition: Any = None) -> Tensor:
        alpha, sigma = self.node(level.reshape(-1)[0].double())
        state, timestep = alpha * x.double(), self.schedule.timestep(alpha, sigma)
        output = self.network(state, timestep, condition).double()
        on_state, on_output = data_weights(self.schedule.prediction_type, alpha, sigma)
        return on_state * state + on_output * output


class Names:
    """A network that answers its k-th call with unit vector k + 1 and keeps what it was shown; unit 0 is the noise."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.timesteps: list[Tensor] = []

    def __call__(self, state: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        self.states.append(state.flatten())
        self.timesteps.append(timestep)
        return torch.nn.functional.one_hot(torch.tensor(len(self.states)), state.shape[1]).reshape(state.shape)


def released(folder: Path) -> types.SimpleNamespace:
    """Modules of a checkout, told that there is no GPU, and that perceptual losses and films are not asked for."""
    if not (folder / "noise_schedulers.py").is_file():
        raise ValueError(f"{folder} is no checkout of LD3: it has no noise_schedulers.py")
    sys.path.insert(0, str(folder))
    absent = {name: types.ModuleType(name) for name in ("lpips", "imageio") if name not in sys.modules}
    sys.modules.update(absent)
    import dataset
    import noise_schedulers
    import trainer
    import utils

    for name in absent:
        del sys.modules[name]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign,assignment]
    trainer.save_gif = trainer.LD3Trainer._visual_times = lambda _: None
    return types.SimpleNamespace(folder=folder, dataset=dataset, noises=noise_schedulers, trainer=trainer, utils=utils)


def counted(denoiser: Any, spent: Evaluations) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The denoiser, its evaluations added to `spent`."""

    def network(state: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        output = denoiser(state.float(), timestep.float().expand(len(state)), condition)
        spent.forward += len(state)
        spent.backward += len(state) * output.requires_grad
        return output

    return network


def settings(code: Any, solver: str, order: int | None, nfe: int, shape: Sequence[int]) -> argparse.Namespace:
    """Those of configs/cifar10.yml for a solver, a number of evaluations and samples of a shape (C, H, W)."""
    args = argparse.Namespace(**yaml.safe_load((code.folder / "configs" / "cifar10.yml").read_text()))
    args.solver_name, highest = SOLVERS[solver]
    args.order = order or highest
    args.steps, args.loss_type, args.visualize, args.gits_ts, args.use_gits = nfe, "L2", False, None, False
    return code.utils.adjust_hyper(args, shape[-1], shape[0])


def learned(code: Any, args: argparse.Namespace, net: Edm, pairs: Trajectories) -> Any:
    """The trainer after its rounds; it writes its files into `log` in the working directory."""
    noise = code.noises.NoiseScheduleVE(schedule="edm", sigma_min=SMALLEST, sigma_max=LARGEST)
    solver, steps, extra = code.utils.get_solvers(args.solver_name, args.steps, args.order, noise, args.unipc_variant)
    conditions = [None if pairs.condition is None else index_condition(pairs.condition, i) for i in range(len(pairs))]
    whole = list(pairs.noise), list(pairs.noise.clone()), list(pairs.end), conditions, [None] * len(pairs)
    parts = slice(args.num_train), slice(args.num_train, args.num_train + args.num_valid)
    train, valid = (code.dataset.LD3Dataset(*(column[part] for column in whole)) for part in parts)
    known = code.trainer.TrainingConfig.__dataclass_fields__
    training = code.trainer.TrainingConfig(
        train_data=train,
        valid_data=valid,
        train_batch_size=args.main_train_batch_size,
        valid_batch_size=args.main_valid_batch_size,
        **{name: value for name, value in vars(args).items() if name in known},
    )
    model = code.trainer.ModelConfig(
        net=lambda x, level, condition, _: (x - net(x, level, condition)) / level.reshape(-1, 1, 1, 1),
        decoding_fn=lambda images: images,
        noise_schedule=noise,
        solver=solver,
        solver_name=args.solver_name,
        order=args.order,
        steps=steps,
        prior_bound=args.prior_bound,
        resolution=pairs.end.shape[-1],
        channels=pairs.end.shape[1],
        time_mode=args.time_mode,
        solver_extra_params=extra,
        snapshot_path="log",
        device=torch.device("cpu"),
    )
    trainer = code.trainer.LD3Trainer(model, training)
    trainer.train(args.training_rounds_v1, args.training_rounds_v2)
    return trainer


def best_levels(folder: Path) -> tuple[Tensor, Tensor]:
    """Levels of the steps and those that the network is told, of the best validation: a trainer's own are the last."""
    levels = torch.load(folder / "best_v2.pt", weights_only=True)["best_t_steps"].double()
    steps, told = levels.chunk(2)
    return steps, told


def traced(trainer: Any, levels: tuple[Tensor, Tensor], schedule: NoiseSchedule) -> SolverTable:
    """The trainer's solver on some steps as a table, by one run on names of the noise and of the outputs."""
    names, rows = Names(), trainer.steps
    net, noise = Edm(schedule, names), torch.eye(rows + 2, dtype=torch.float64)[0].reshape(1, -1, 1, 1)
    image = trainer.solver.sample_simple(
        model_fn=lambda x, level, *_: (x - net(x, level)) / level.reshape(-1, 1, 1, 1),
        x=LARGEST * noise,
        timesteps=levels[0],
        timesteps2=levels[1],
        order=trainer.order,
        NFEs=rows,
        **trainer.solver_extra_params,
    )
    states = torch.stack([*names.states[:rows], image.flatten()])[:, : rows + 1]  # UniPC's last call is of no use
    start_scale = float(states[0, 0])
    state_coef, output_coef = torch.zeros(2, rows, rows, dtype=torch.float64)
    state_coef[:, 0], output_coef[:] = states[1:, 0] / start_scale, states[1:, 1:]
    alpha, sigma = (torch.stack(part) for part in zip(*(net.node(level) for level in levels[1][:-1])))
    return SolverTable(
        torch.stack(names.timesteps[:rows]),
        torch.cat([alpha, alpha.new_ones(1)]),
        torch.cat([sigma, sigma.new_full((1,), SMALLEST)]),
        state_coef,
        output_coef,
        torch.zeros_like(state_coef),
        start_scale,
        schedule.prediction_type,
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the artifacts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="checkout of LD3: its code runs")
    parser.add_argument("--denoiser", required=True, help="checkpoint folder")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--trajectories", required=True, help="folder of the teacher's, at least 100")
    parser.add_argument("--solvers", nargs="+", choices=sorted(SOLVERS), default=["unipc"])
    parser.add_argument("--order", type=int, help="of the solver; default 3 for UniPC, 4 for iPNDM")
    parser.add_argument("--nfe", nargs="+", type=int, default=[4, 5, 6, 8, 10])
    parser.add_argument("--output", type=Path, required=True, help="folder of the artifacts")
    options = parser.parse_args(arguments)
    denoiser = load_denoiser(options.denoiser, options.guidance_scale, precision=options.precision)
    denoiser.requires_grad_(False)
    cache, code = TrajectoryCache(options.trajectories), released(options.code.resolve())
    output = options.output.resolve()
    cache.check(denoiser)
    for solver, nfe in itertools.product(options.solvers, options.nfe):
        args, spent = settings(code, solver, options.order, nfe, cache.sample_shape), Evaluations.of(denoiser)
        if len(cache) < (wanted := args.num_train + args.num_valid):
            raise ValueError(f"{options.trajectories} has {len(cache)} trajectories: {wanted} are needed")
        pairs = cache.load(wanted)
        code.utils.set_seed_everything(args.seed)
        with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
            trainer = learned(code, args, Edm(denoiser.schedule, counted(denoiser, spent)), pairs)
            levels = best_levels(Path("log"))
        fitted = {"teacher": cache.manifest["solver"], "seeds": seed_ranges(pairs.seeds)}
        config = {"source": "arXiv 2405.15506, released code", "loss": args.loss_type, "order": args.order}
        print(
            save_solver(
                traced(trainer, levels, denoiser.schedule),
                output / f"ld3-{solver}-{nfe}.json",
                identify(denoiser),
                method="ld3",
                fitted_on=fitted | {"evaluations": spent.record()},
                config=config,
            ),
            f"validation loss {trainer.best_loss:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    guarded(main)
