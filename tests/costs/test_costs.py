"""What units cost, against written checkpoints and real caches; targets against all removals."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import Command
from matplotlib.cbook import STEP_LOOKUP_MAP
from safetensors import safe_open
from tiny import tiny_config, tiny_random_model

import blockspin as bs
from blockspin.costs import timing
from blockspin.costs.targets import budgets_for, goals_of, what_is_left
from blockspin.costs.timing import Check, Seconds, TimeTable, check_table, measure_times, one_of, speedup
from blockspin.costs.units import unit_costs
from blockspin.energies.gradients import Gradients
from blockspin.evaluation.cost import Workload
from blockspin.pipeline.front import Point, front_figure
from blockspin.problem import Block, Budget, Sublayer
from blockspin.targets import TargetSettings

FAMILIES = ["llama", "gemma2", "qwen3_moe", "deepseek_v3", "nemotron_h"]


def save(folder: Path, model_type: str, **changes: Any) -> tf.PreTrainedModel:
    model = tiny_random_model(tiny_config(model_type, **changes))
    model.save_pretrained(folder)
    return model


def bytes_in(folder: Path) -> int:
    """Of all tensors in the files of a checkpoint."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize("model_type", FAMILIES)
def test_predicted_bytes_are_those_of_the_written_checkpoint(tmp_path: Path, model_type: str) -> None:
    model = save(tmp_path / "model", model_type)
    costs = unit_costs(tmp_path / "model", context=8)
    assert costs.all_bytes == bytes_in(tmp_path / "model")
    assert costs.all_parameters == model.num_parameters()

    removed = [costs.units[-2].index]
    bs.prune_checkpoint(tmp_path / "model", removed, tmp_path / "smaller")
    assert costs.all_bytes - costs.num_bytes[removed[0]] == bytes_in(tmp_path / "smaller")


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("length", [3, 24])
def test_predicted_cache_is_that_of_the_model(tmp_path: Path, model_type: str, length: int) -> None:
    """Also where a window is full: what it holds is counted, not what went through."""
    changes = {"sliding_window": 8} if model_type == "gemma2" else {}
    model = save(tmp_path, model_type, max_position_embeddings=32, **changes)
    costs = unit_costs(tmp_path, context=length)
    cache = model(input_ids=torch.full((1, length), 3), use_cache=True).past_key_values
    held = [sum(t.nbytes for t in vars(layer).values() if torch.is_tensor(t)) for layer in cache.layers]
    assert list(costs.cache_bytes or ()) == held


def test_active_parameters_leave_out_experts_that_are_not_chosen(tmp_path: Path) -> None:
    model = save(tmp_path, "qwen3_moe")
    costs, config = unit_costs(tmp_path), model.config
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    assert idle > 0
    assert costs.all_active == model.num_parameters() - idle
    assert sum(costs.parameters) - sum(costs.active) == idle


def test_sublayers_share_the_costs_of_their_block(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    whole = unit_costs(tmp_path)
    units: list[Sublayer] = []
    for block in whole.units:
        size = block.num_parameters // 4
        units.append(Sublayer(len(units), "attention", size, block.index, 0))
        units.append(Sublayer(len(units), "mlp", block.num_parameters - size, block.index, 1))
    costs = unit_costs(tmp_path, units)
    assert whole.cache_bytes is not None
    assert costs.cache_bytes is not None
    for i in range(len(whole.units)):
        attention, mlp = 2 * i, 2 * i + 1
        assert costs.num_bytes[attention] + costs.num_bytes[mlp] == whole.num_bytes[i]
        assert (costs.cache_bytes[attention], costs.cache_bytes[mlp]) == (whole.cache_bytes[i], 0)


def table(blocks: list[Block]) -> TimeTable:
    """Made-up times, unlike for every kind."""
    kinds = {kind: Seconds(0.01 * (k + 1), 0.002 * (k + 1)) for k, kind in enumerate(sorted({b.kind for b in blocks}))}
    whole = Seconds(*[0.005 + sum(kinds[block.kind][part] for block in blocks) for part in (0, 1)])
    return TimeTable(whole, kinds, "blocks", Workload(), "float32", "cpu", {})


@pytest.mark.parametrize("model_type", ["llama", "nemotron_h"])
def test_targets_allow_exactly_the_removals_that_meet_all_of_them(tmp_path: Path, model_type: str) -> None:
    """Each removal is judged by what is left, in the user's own units."""
    save(tmp_path, model_type)
    costs = unit_costs(tmp_path, context=16)
    times = table(list(costs.units))
    assert costs.cache_bytes is not None or model_type == "nemotron_h"
    memory: dict[str, Any] = {} if costs.cache_bytes is None else {"target_memory": 0.9, "batch": 3}
    targets = TargetSettings(target_params=0.85, target_size=0.9, target_speedup=1.2, context=16, **memory)
    budgets = budgets_for(targets, costs.units, costs, times)
    problem = bs.RemovalProblem(np.eye(len(costs.units)), budgets=budgets)

    some = 0
    for number in range(1, len(costs.units)):
        for removed in itertools.combinations(range(len(costs.units)), number):
            parameters = costs.all_parameters - sum(costs.parameters[i] for i in removed)
            size = costs.all_bytes - sum(costs.num_bytes[i] for i in removed)
            wanted = parameters <= 0.85 * costs.all_parameters and size <= 0.9 * costs.all_bytes
            wanted = wanted and times.whole.decode / times.without(costs.units, removed).decode >= 1.2 - 1e-9
            if costs.cache_bytes is not None:
                whole = costs.all_bytes + 3 * sum(costs.cache_bytes)
                wanted = (
                    wanted
                    and size + 3 * sum(costs.cache_bytes) - 3 * sum(costs.cache_bytes[i] for i in removed)
                    <= 0.9 * whole
                )
            assert problem.allows(removed) == wanted
            some += wanted
            left = {met.goal.split()[0]: met.left for met in what_is_left(budgets, removed)}
            assert (left["--target-params"], left["--target-size"]) == (parameters, size)
    assert some > 0


def test_absolute_targets_and_shares_say_the_same(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    costs = unit_costs(tmp_path)
    share = budgets_for(TargetSettings(target_size=0.75), costs.units, costs, None)[0]
    absolute = budgets_for(TargetSettings(target_size=int(0.75 * costs.all_bytes)), costs.units, costs, None)[0]
    assert (share.least, share.weight) == (absolute.least, absolute.weight)
    assert share.goal == "--target-size 75%"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target_size": 1000}, r"--target-size 1kB: out of reach: at most .* can go, so .*B stay"),
        ({"target_params": 0.05}, r"--target-params 5%: out of reach"),
        ({"target_memory": 0.5, "context": 10**9}, r"holds .* tokens, not 1,000,000,000 \(--context\)"),
    ],
)
def test_targets_out_of_reach_say_what_is_nearest(tmp_path: Path, targets: dict[str, Any], message: str) -> None:
    save(tmp_path, "llama")
    blocks = unit_costs(tmp_path).units
    with pytest.raises(ValueError, match=message):
        bs.RemovalProblem(np.eye(len(blocks)), budgets=goals_of(TargetSettings(**targets), tmp_path, blocks))


def test_times_are_those_of_the_difference() -> None:
    assert one_of(Seconds(1.0, 0.5), Seconds(0.7, 0.4), 3) == pytest.approx((0.1, 0.1 / 3))
    assert one_of(Seconds(1.0, 0.5), Seconds(1.1, 0.5), 3) == (0.0, 0.0)
    assert speedup(Seconds(1.0, 0.6), Seconds(0.5, 0.4)) == pytest.approx((2.0, 1.5))
    blocks = [Block(0, "attention", 1), Block(1, "mlp", 1), Block(2, "attention", 1)]
    assert table(blocks).without(blocks, (0, 1)) == pytest.approx((0.005 + 0.01, 0.005 + 0.002))
    text = Check(Seconds(1.5, 1.5), Seconds(1.5, 1.44)).summary()
    assert re.search(r"decode 1\.44x as fast \(1\.50x predicted; 4\.0% below what was predicted\)", text)


def test_a_profile_is_a_file_that_survives(tmp_path: Path) -> None:
    model = tiny_random_model(tiny_config("nemotron_h"))
    times = measure_times(model, workload=Workload(1, 4, 2), rounds=1, progress=False)
    assert {*times.kinds} == {block.kind for block in bs.find_blocks(model)}
    assert times.kinds["attention"] == (0.0, 0.0)  # there is one, without which the cache does not work
    assert times.whole.prefill > 0
    times.save(tmp_path / "table.json")
    assert TimeTable.load(tmp_path / "table.json") == times


@pytest.mark.parametrize(("noise", "most"), [(0.0, timing.LEAST_ROUNDS), (5.0, timing.ROUNDS)])
def test_other_work_on_the_machine_does_not_change_a_profile(
    monkeypatch: pytest.MonkeyPatch, noise: float, most: int
) -> None:
    """It adds something to a third of the steps; where it does, more rounds are measured."""
    generator = np.random.default_rng(0)
    counted = []

    def disturbed(models: dict[str, Any], prompts: object, new_tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
        for number in range(rounds):
            counted.append(number)
            turns = {}
            for name in models:
                quiet = np.linspace(1.0, 2.0, 1 + new_tokens) * (1.0 if name == timing.WHOLE else 0.6)
                late = generator.random(quiet.shape) < 1 / 3
                turns[name] = quiet + noise * late * generator.random(quiet.shape)
            yield turns

    monkeypatch.setattr(timing, "rounds_of_steps", disturbed)
    model = tiny_random_model(tiny_config("llama"))
    times = measure_times(model, workload=Workload(1, 4, 8), progress=False)
    assert times.whole == pytest.approx((1.0, np.linspace(1.0, 2.0, 9)[1:].sum()))
    (one_block,) = times.kinds.values()
    assert one_block.prefill == pytest.approx(0.4 / (model.config.num_hidden_layers // 2))  # half of them are left out
    assert timing.LEAST_ROUNDS <= len(counted) <= most
    assert times.spread is not None
    assert times.spread <= timing.STEADY
    assert "times differ by 0.0%" in times.table().markdown()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"whole": [1, 2]}', '{"whole": [1, "x"], "kinds": {}}'),
        '{"whole": [1, 2], "kinds": {"attention+mlp": [0, 0]}}',
        '{"whole": [0, 2], "kinds": {"attention+mlp": [0.1, 0.1]}}',
        '{"whole": [1, 2], "kinds": {"attention+mlp": [0.1, Infinity]}}',
    ],
)
def test_what_is_no_table_of_times_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is no table of times .*blockspin profile"):
        TimeTable.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        TimeTable.load(tmp_path / "missing.json")


def test_a_table_of_another_model_is_refused() -> None:
    times = table([Block(0, "attention", 1)])
    with pytest.raises(ValueError, match=r"of the kinds attention; the model's blocks are of mamba: .*--profile"):
        check_table(times, [Block(0, "mamba", 1)], "table.json")


def test_units_take_no_longer_than_the_whole_model() -> None:
    blocks = [Block(i, "attention+mlp", 1) for i in range(4)]
    whole = Seconds(1.0, 2.0)
    too_long = TimeTable(whole, {"attention+mlp": Seconds(0.2, 0.6)}, "blocks", Workload(), "float32", "cpu", {})
    with pytest.raises(ValueError, match=r"decode takes 2\.4 s in all 4 blocks together, and 2 s in the whole model"):
        check_table(too_long, blocks, "table.json")


def test_measured_times_add_up_to_the_whole_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise may say that half of the blocks take more than half of the time."""

    def disturbed(models: dict[str, Any], prompts: object, new_tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
        for _ in range(rounds):
            yield {name: np.full(1 + new_tokens, 1.0 if name == timing.WHOLE else 0.25) for name in models}

    monkeypatch.setattr(timing, "rounds_of_steps", disturbed)
    model = tiny_random_model(tiny_config("llama"))
    times = measure_times(model, workload=Workload(1, 4, 2), progress=False)
    blocks = bs.find_blocks(model)
    check_table(times, blocks, "table.json")
    (one_block,) = times.kinds.values()
    assert one_block == pytest.approx((1 / len(blocks), 2 / len(blocks)))


def energies_file(folder: Path) -> Path:
    """Gradients made up for a tiny model, as a file that says which model it is."""
    save(folder / "model", "llama")
    blocks = tuple(unit_costs(folder / "model").units)
    matrix = np.random.default_rng(0).normal(size=(40, len(blocks))).astype(np.float32)
    path = folder / "energies.safetensors"
    Gradients(matrix, blocks, np.zeros(40, np.float32), metadata={"model": str(folder / "model")}).save(path)
    return path


def test_options_that_change_nothing_are_named(tmp_path: Path, command: Command) -> None:
    path = energies_file(tmp_path)
    times = tmp_path / "times.json"
    table(list(unit_costs(tmp_path / "model").units)).save(times)
    unused = ["--context", "1k", "--batch", 2, "--profile", times]
    _, said = command("solve", path, "--remove", 1, *unused)
    assert "without --target-memory, --context and --batch change nothing" in said
    assert "without --target-speedup or --target-prefill-speedup, --profile changes nothing" in said

    # What a target or a sweep counts is of use.
    for target in (["--remove", 1, "--target-memory", "99%"], ["--sweep", "memory", "--points", 2]):
        code, said = command("solve", path, *target, "--context", 8, "--batch", 2)
        assert code == 0, said
        assert "nothing" not in said
    code, said = command("solve", path, "--sweep", "speedup", "--points", 2, "--profile", times)
    assert code == 0, said
    assert "nothing" not in said

    # A sweep has one state for each of its points.
    _, said = command("solve", path, "--sweep", "params", "--points", 2, "--states", 5, "--limit", 3)
    assert "with --sweep, --limit and --states change nothing" in said
    _, said = command("solve", path, "--remove", 1, "--points", 3)
    assert "without --sweep, --points changes nothing" in said


def test_a_sweep_says_why_it_ends_and_keeps_its_figure_apart(tmp_path: Path, command: Command) -> None:
    path = energies_file(tmp_path)
    code, said = command("solve", path, "--sweep", "params", "--remove", 1, "--points", 6)
    assert code == 0, said
    assert "The front ends before" in said
    code, said = command("solve", path, "--sweep", "params", "--out", tmp_path / "front.svg")
    assert code == 2
    assert "is the name of the figure; give that of the JSON file" in said
    assert not (tmp_path / "front.svg").exists()


def test_solving_for_targets(tmp_path: Path, command: Command) -> None:
    path = energies_file(tmp_path)
    table(list(unit_costs(tmp_path / "model").units)).save(tmp_path / "times.json")
    options = ["--target-size", "80%", "--target-speedup", "1.3", "--profile", tmp_path / "times.json", "--json"]
    code, text = command("solve", path, *options)
    assert code == 0
    found, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    assert [goal["goal"] for goal in found["goals"]] == ["--target-size 80%", "--target-speedup 1.3"]
    for goal in found["goals"]:
        assert goal["left"] <= goal["at_most"] < goal["whole"]


def test_a_front_is_monotone_and_drawn(tmp_path: Path, command: Command) -> None:
    path = energies_file(tmp_path)
    options = ["--sweep", "size", "--points", "6", "--out", tmp_path / "front.json"]
    code, text = command("solve", path, *options)
    assert (code, "front.svg" in text) == (0, True)
    front = json.loads((tmp_path / "front.json").read_text())["points"]
    assert (tmp_path / "front.svg").read_text().startswith("<?xml")
    energies, budgets = [p["energy"] for p in front], [p["at_most"] for p in front]
    assert energies == sorted(energies)
    assert budgets == sorted(budgets, reverse=True)
    assert all(p["left"] <= p["at_most"] and p["lower_bound"] == p["energy"] for p in front)


def test_a_budget_between_two_points_is_drawn_as_what_meets_it() -> None:
    points = [Point(at_most=90, left=88, energy=1.0, lower_bound=1.0, removed=(0,)), Point(80, 75, 2.0, 2.0, (0, 1))]
    figure = front_figure(points, Budget("--target-size", (12, 13, 75), 10, 100, "B"))
    (line,) = figure.axes[0].lines
    corners = list(zip(*STEP_LOOKUP_MAP[line.get_drawstyle()](*line.get_data()), strict=True))

    # What leaves 88 is more than 85.
    drawn_at_85 = {y for (x, y), (next_x, next_y) in itertools.pairwise(corners) if next_x < 85 < x and y == next_y}
    assert drawn_at_85 == {2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--remove 8"),
        (["--target-size", "5 furlongs"], r"--target-size:? must be a size .* unknown unit 'furlongs'"),
        (["--target-speedup", "1.4"], "needs times: measure them with `blockspin profile"),
        (["--target-speedup", "0.9"], "must be above 1"),
        (["--remove", "1", "--target-size", "30%"], "--target-size 30%: out of reach"),
        (["--remove", "mamba=1", "--target-size", "90%"], "no block is of kind 'mamba'"),
        (["--target-size", "1TB"], "--target-size 1TB: the model meets that already"),
        (["--sweep", "speedup"], "needs a table"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, command: Command, options: list[str], message: str) -> None:
    code, text = command("solve", energies_file(tmp_path), *options)
    assert code == 2
    assert re.search(message, " ".join(text.split()))
